"""Puts gin_configs/ and tasks/ inside the built package; all else: pyproject.toml.

They stay at the top of the repository, where an editable install reads them; see
`vit22b_transfer/recipes/shipped.py`.
"""

import os
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("gin_configs", "tasks")


class BuildWithShipped(build_py):
    """Builds the package, then copies the shipped folders into it."""

    def run(self):
        """Both; an editable install reads the folders where they are."""
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            target = os.path.join(self.build_lib, "vit22b_transfer", "shipped", folder)
            shutil.rmtree(target, ignore_errors=True)
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(folder, target, ignore=leave)


setup(cmdclass={"build_py": BuildWithShipped})
