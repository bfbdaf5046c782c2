"""Weight files of every kind, as their readers give them: the base class and its errors."""
