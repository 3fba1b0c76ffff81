"""The command `plan`: what may be asked, and the answer. Printing is the caller's."""
