"""What a captured step consists of: nodes and values, their work and workspace, and what is always there."""
