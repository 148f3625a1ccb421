"""The operators as PyTorch sees them, one module each: schema, fake and autograd.

An eager call of plain tensors calls the native functions directly and ties their results to an autograd function. Any
other call (`torch.compile`, `torch.export`, fake tensors, subclasses, dispatch modes) goes through the operators that
are registered with PyTorch's dispatcher. Their fakes touch no memory. The dispatcher costs 10 us, forward and backward
together; `x - mu` and its backward take 11 us.
"""
