"""A plan, a front or a refusal as lines, objects, tables and figures. Nothing is decided here."""
