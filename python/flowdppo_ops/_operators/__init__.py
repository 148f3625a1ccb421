"""The operators in PyTorch: schema, fake, autograd, and a short way past all three.

Two ways lead to the same native functions. A call of plain tensors in eager mode takes an autograd function that calls
them directly; everything else (`torch.compile`, `torch.export`, fake tensors, subclasses, dispatch modes) goes through
the registered operators, whose fakes never touch memory. An operator call alone costs 10 us more than the direct one,
forward and backward together, beside 11 us for `x - mu` and its backward.

One module an operator.
"""
