"""What a check of kernels raises."""


class WrongResult(ArithmeticError):
    """A kernel ran and gave something else than the reference. The message says in which case, and how far off."""
