"""Tools for developing the pack: environment, server, test models, demo. Never imported by the host."""
