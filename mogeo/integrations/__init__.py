"""mogeo inside other people's trainers: users of the library, never the other way round. Each has an extra of its name.

Nothing is imported here, so that one integration does not ask for the packages of another.
"""
