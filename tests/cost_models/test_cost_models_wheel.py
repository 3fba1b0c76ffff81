import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cost_models

ROOT = Path(cost_models.__file__).parents[1]


def test_a_built_wheel_contains_every_spec_and_every_cluster(tmp_path: Path):
    setuptools = pytest.importorskip("setuptools", reason="builds a wheel with setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"pyproject.toml asks for setuptools 77, here is {setuptools.__version__}")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cost_models", tmp_path / "cost_models", ignore=ignore)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        packed = {name for name in content.namelist() if name.endswith(".toml")}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "cost_models").rglob("*.toml")}
    assert packed == source
    assert len(source) >= 36  # 22 devices and 14 clusters
