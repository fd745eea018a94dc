"""Package metadata. Exact versions of everything are in constraints.txt; here is what the package accepts."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-stable",
    version="0.1.0",
    description="A Megatron-style trainer for language models on DeepSpeed, with published stability methods built in",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_stable", "megatron_stable.*"]),
    package_data={"megatron_stable": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "pydantic>=2",
        "typer>=0.29",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "matplotlib",
        "numpy",
        "packaging",
        "pyyaml",
        "pyarrow",
        "zstandard",
        "psutil",
        "xxhash>=3",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "filelock",
            "hypothesis",
            "ruff",
            "mypy",
            "codespell",
            "types-PyYAML",
            "playwright",
            "axe-playwright-python",
            "wandb",
        ],
        "wandb": ["wandb"],
        "mpi": ["mpi4py"],
        "hf": ["transformers"],
    },
    entry_points={"console_scripts": ["megatron-stable = megatron_stable.commands.app:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
