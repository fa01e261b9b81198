"""The papers of the poisons: what each method does in a sentence, and how to cite it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A method's source. `does` completes "Every picture ..."."""

    title: str
    author: str | None
    venue: str
    year: int
    does: str

    def bibtex(self, method: str) -> str:
        """An entry for a bibliography; authors after the first are "others", and none are named where none is known."""
        fields = {"title": self.title, "booktitle": self.venue, "year": str(self.year)}
        if self.author is not None:
            fields["author"] = f"{self.author} and others"
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@inproceedings{{{method}{self.year},\n{lines}\n}}"


PAPERS = {
    "ar": Paper(
        "Autoregressive Perturbations for Data Poisoning",
        "Sandoval-Segura, Pedro",
        "NeurIPS",
        2022,
        "got a faint pattern of its class's autoregressive process",
    ),
    "clusters": Paper(
        "Unlearnable Clusters: Towards Label-agnostic Unlearnable Examples",
        "Zhang, Jiaming",
        "CVPR",
        2023,
        "got the perturbation that a generator learned for its cluster of features",
    ),
    "cuda": Paper(
        "CUDA: Convolution-based Unlearnable Datasets",
        "Sadasivan, Vinu Sankar",
        "CVPR",
        2023,
        "was blurred with a random filter that is private to its class",
    ),
    "deep-confuse": Paper(
        "Learning to Confuse: Generating Training Time Adversarial Data with Auto-Encoder",
        "Feng, Ji",
        "NeurIPS",
        2019,
        "got noise from an auto-encoder that was trained to mislead a classifier",
    ),
    "em": Paper(
        "Unlearnable Examples: Making Personal Data Unexploitable",
        "Huang, Hanxun",
        "ICLR",
        2021,
        "got noise that makes its training loss small, so that nothing is left to learn",
    ),
    "entf": Paper(
        "Is Adversarial Training Really a Silver Bullet for Mitigating Data Poisoning?",
        "Wen, Rui",
        "ICLR",
        2023,
        "was moved so that its features are entangled with those of other classes",
    ),
    "hypo": Paper(
        "Better Safe Than Sorry: Preventing Delusive Adversaries with Adversarial Training",
        "Tao, Lue",
        "NeurIPS",
        2021,
        "got noise that makes it look more like its own class to a trained network",
    ),
    "lsp": Paper(
        "Availability Attacks Create Shortcuts",
        "Yu, Da",
        "KDD",
        2022,
        "got coloured patches that are linearly separable by class",
    ),
    "min-max-min": Paper(
        "Re-thinking Data Availability Attacks Against Deep Neural Networks",
        "Fang, Bin",
        "CVPR",
        2024,
        "got noise that stays easy to learn under adversarial training and average randomness",
    ),
    "ntga": Paper(
        "Neural Tangent Generalization Attacks",
        "Yuan, Chia-Hung",
        "ICML",
        2021,
        "was moved so that infinitely wide networks trained on it generalise badly",
    ),
    "ops": Paper(
        "One-Pixel Shortcut: on the Learning Preference of Deep Neural Networks",
        "Wu, Shutong",
        "ICLR",
        2023,
        "has one pixel set to a colour that is the same for its class",
    ),
    "pil": Paper(
        "Perturbation-Induced Linearization: Constructing Unlearnable Data with Solely Linear Classifiers",
        None,
        "ICLR",
        2026,
        "got noise that lets a network rely on linear features",
    ),
    "robust-em": Paper(
        "Robust Unlearnable Examples: Protecting Data Privacy Against Adversarial Learning",
        "Fu, Shaopeng",
        "ICLR",
        2022,
        "got noise that makes its adversarial training loss small",
    ),
    "sem": Paper(
        "Stable Unlearnable Example: Enhancing the Robustness of Unlearnable Examples "
        "via Stable Error-Minimizing Noise",
        "Liu, Yixin",
        "AAAI",
        2024,
        "got noise that makes its training loss small under random perturbations",
    ),
    "tap": Paper(
        "Adversarial Examples Make Strong Poisons",
        "Fowl, Liam",
        "NeurIPS",
        2021,
        "was turned into an adversarial example of a trained network",
    ),
}
