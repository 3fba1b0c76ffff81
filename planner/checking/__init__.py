"""Checking: a plan executed beside eager on real data, priced and corrected by what is measured there."""
