"""mogeo inside other people's trainers. Each integration uses the library as anyone would, and has an extra of its
name.

Nothing is imported here, so that one integration does not need the packages of another.
"""
