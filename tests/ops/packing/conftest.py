from packing_cases import by  # noqa: F401
