"""Recurrent layers traced as eager mode computes them: the kernel of an LSTM, and the steps of a GRU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch._C import DispatchKey

LSTM_LAYER = torch.ops.aten.mkldnn_rnn_layer.default
_LSTM_BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default
_GRU, _GRU_CELL = torch.ops.aten.gru.input, torch.ops.aten.gru_cell.default
_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)


@contextmanager
def recurrent_layers() -> Iterator[None]:
    """Replaces for a trace what would make a recurrent layer give, or seem to give, other values than eager."""
    before = {operator: dict(operator.py_kernels) for operator in (_GRU, _GRU_CELL, _LSTM_BACKWARD)}
    meta = before[_LSTM_BACKWARD].get(DispatchKey.Meta)
    inside = {
        _GRU: before[_GRU] | dict.fromkeys(_KEYS, _gru),
        _GRU_CELL: before[_GRU_CELL] | dict.fromkeys(_KEYS, _gru_cell),
        _LSTM_BACKWARD: before[_LSTM_BACKWARD] | ({DispatchKey.Meta: _two_biases(meta)} if meta else {}),
    }
    _set_kernels(inside)
    try:
        yield
    finally:
        _set_kernels(before)


def _set_kernels(kernels_of: Mapping[Any, Mapping[DispatchKey, Callable[..., Any]]]) -> None:
    for operator, kernels in kernels_of.items():
        operator.py_kernels.clear()
        operator.py_kernels.update(kernels)
        operator._dispatch_cache.clear()


def _two_biases(meta: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel makes the gradients of the two biases as two tensors; torch's meta kernel says one."""

    def separate(*args: Any) -> Any:
        outputs = meta(*args)
        return (*outputs[:4], torch.empty_like(outputs[3]), *outputs[5:])

    return separate


def lstm_layer(*args: Any) -> Any:
    """One layer of an LSTM with the state that its backward reads: the kernel makes it only if gradients are on."""
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return LSTM_LAYER(*args)


def _gru(
    inputs: torch.Tensor,
    hx: torch.Tensor,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`aten.gru.input` on the CPU: its C++ body with another step."""
    if inputs.device.type != "cpu":
        return _GRU._op_dk(
            DispatchKey.CompositeImplicitAutograd,
            *(inputs, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first),
        )
    each = 4 if has_biases else 2
    weights: list[Any] = [(*params[i : i + each], None, None)[:4] for i in range(0, len(params), each)]
    hiddens = hx.unbind(0)
    directions = 2 if bidirectional else 1
    final: list[torch.Tensor] = []
    layer = inputs.transpose(0, 1) if batch_first else inputs
    for number in range(num_layers):
        outputs = []
        for direction in range(directions):
            w_ih, w_hh, b_ih, b_hh = weights[number * directions + direction]
            hidden = hiddens[number * directions + direction]
            gates = F.linear(layer, w_ih, b_ih).unbind(0)
            steps = []
            for gate in reversed(gates) if direction else gates:
                hidden = _gru_step(gate, hidden, w_hh, b_hh)
                steps.append(hidden)
            final.append(hidden)
            outputs.append(torch.stack(steps[::-1] if direction else steps, 0))
        layer = torch.cat(outputs, outputs[0].dim() - 1) if bidirectional else outputs[0]
        if dropout != 0 and train and number < num_layers - 1:
            layer = torch.dropout(layer, dropout, True)
    return layer.transpose(0, 1) if batch_first else layer, torch.stack(final, 0)


def _gru_cell(
    inputs: torch.Tensor, hx: torch.Tensor, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> torch.Tensor:
    """`aten.gru_cell` on the CPU: its C++ body with another step."""
    if inputs.device.type != "cpu":
        return _GRU_CELL._op_dk(DispatchKey.CompositeImplicitAutograd, inputs, hx, w_ih, w_hh, b_ih, b_hh)
    return _gru_step(F.linear(inputs, w_ih, b_ih), hx, w_hh, b_hh)


def _gru_step(
    of_input: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One step of a GRU, with the two gates that have a sigmoid side by side.

    Eager mode computes them in place, in rows of the buffer of all gates. Traced, that becomes a sigmoid of a dense
    tensor, of which the vector kernel rounds other elements than those at the end of each row.
    """
    size = hidden.shape[1]
    two_in, new_in = of_input.unsafe_split_with_sizes([2 * size, size], 1)
    two_hidden, new_hidden = F.linear(hidden, weight, bias).unsafe_split_with_sizes([2 * size, size], 1)
    reset_gate, input_gate = (two_hidden + two_in).unsafe_split(size, 1)
    reset_gate, input_gate = reset_gate.sigmoid(), input_gate.sigmoid()
    new_gate = (new_in + new_hidden * reset_gate).tanh()
    return (hidden - new_gate) * input_gate + new_gate
