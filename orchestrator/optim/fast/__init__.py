"""The fast implementations of the optimizers: a kernel for the processor, lists of tensors elsewhere."""
