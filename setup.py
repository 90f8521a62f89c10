"""Packages of mogeo. `kernels/` lies at the top level and is installed as `mogeo.kernels`; metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mogeo", "mogeo.*"]), "mogeo.kernels"],
    package_dir={"mogeo.kernels": "kernels"},
)
