"""The packed tensor: what it is made of, its rows and its copies."""
