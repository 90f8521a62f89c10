"""Packages of mogeo; metadata is in pyproject.toml. `kernels/` at the top level is installed as `mogeo.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mogeo", "mogeo.*"]), "mogeo.kernels"],
    package_dir={"mogeo.kernels": "kernels"},
)
