"""What pyproject.toml cannot say: the one part that is compiled, and left out where it cannot be."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "dressage._few_rows",
            ["src/dressage/few_rows.c"],
            # Not linked with OpenMP: its functions are found in the one that torch brings.
            extra_compile_args=["-O3", "-fopenmp"],
            optional=True,
        )
    ]
)
