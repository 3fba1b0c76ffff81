"""Plans block by block: one block of each kind is captured and solved once, its options are chosen for all."""
