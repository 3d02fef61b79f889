"""Mutants of the losses and trainers for other packages."""

from . import Mutant

_SENTENCES = "minilm_kernels/integrations/sentence_transformers.py"
_TESTS = "tests/integrations/test_sentence_transformers.py -k"

MUTANTS = [
    Mutant(
        _SENTENCES,
        "        self.term.clear()  # the forwards of evaluators\n",
        "",
        f"{_TESTS} other_forwards",
        "the step after an evaluation fails",
    ),
    Mutant(
        _SENTENCES,
        "torch.stack([value for value, _ in columns]).mean()",
        "torch.stack([value for value, _ in columns]).sum()",
        f"{_TESTS} weighted_mean",
        "the weight of the relation loss depends on the number of columns",
    ),
    Mutant(
        _SENTENCES,
        "relation + 0.0 * sum(x.float().sum() for x in embeddings)",
        "relation",
        f"{_TESTS} two_processes",
        "the relation loss alone does not run in several processes",
    ),
    Mutant(
        _SENTENCES,
        "labels.unbind(1) if labels.dim() == 3 else [labels] * len(embeddings)",
        "[labels] * len(embeddings)",
        f"{_TESTS} labels_can",
        "each column is compared with the teacher's embeddings of all columns",
    ),
    Mutant(
        "minilm_kernels/recording.py",
        "        called = _called(model, self._stack.root)",
        "        called = self._stack.root",
        "tests/test_recording.py -k checkpointed_sentence",
        "recording a checkpointed SentenceTransformer fails",
    ),
]
