"""What pyproject.toml cannot say: the parts that are compiled, and left out where they cannot be."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("dressage._arena", ["src/dressage/arena.c"], extra_compile_args=["-O2"], optional=True),
        *(
            Extension(
                f"dressage._few_rows_{kind}",
                ["src/dressage/few_rows.c", "src/dressage/next_token.c"],
                depends=["src/dressage/few_rows.h"],
                define_macros=macros,
                # Not linked with OpenMP: its functions are found in the one that torch brings. A product and its sum
                # are rounded once, whoever compiles.
                extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast"],
                optional=True,
            )
            for kind, macros in {"avx2": [], "avx512": [("WITH_AVX512", None)]}.items()
        ),
    ]
)
