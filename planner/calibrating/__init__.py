"""Times of operations, taken one by one on this device."""
