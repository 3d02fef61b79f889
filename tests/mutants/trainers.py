"""Mutants of the losses and trainers for other packages."""

from . import Mutant

_SENTENCES = "minilm_kernels/integrations/sentence_transformers.py"
_TESTS = "tests/integrations/test_sentence_transformers.py -k"
_TRANSFORMERS = "minilm_kernels/integrations/transformers.py"
_TRANSFORMERS_TESTS = "tests/integrations/test_transformers.py"

MUTANTS = [
    Mutant(
        _TRANSFORMERS,
        '    return "loss_function" in computed_by and model.loss_function is ForCausalLMLoss\n',
        '    return getattr(model, "loss_type", None) == "ForCausalLM"\n',
        f"{_TRANSFORMERS_TESTS} -k accumulated",
        "GPT-2's loss is averaged as if it had a label for the first token",
    ),
    Mutant(
        _TRANSFORMERS,
        "        loss = self.args.relation_weight * relation * shares[0] + own\n",
        "        loss = self.args.relation_weight * relation / self.current_gradient_accumulation_steps + own\n",
        f"{_TRANSFORMERS_TESTS} -k accumulated",
        "sequences of a short last micro-batch count more than others",
    ),
    Mutant(
        _TRANSFORMERS,
        "scaled = own if complete else own * share",
        "scaled = own",
        f"{_TRANSFORMERS_TESTS} -k accumulated",
        "the masked-LM loss is too large by the number of micro-batches",
    ),
    Mutant(
        _TRANSFORMERS,
        "        own = torch.where(count > 0, own, 0.0)  # an average over no labels is NaN\n",
        "",
        f"{_TRANSFORMERS_TESTS} -k without_labels",
        "a micro-batch without labels makes the loss NaN",
    ),
    Mutant(
        _TRANSFORMERS,
        "(labels[..., 1:] if self._shifts else labels)",
        "labels",
        f"{_TRANSFORMERS_TESTS} -k accumulated",
        "micro-batches of a causal language model count the first tokens, which are no labels",
    ),
    Mutant(
        _TRANSFORMERS,
        "        if self._replicas > 1:\n            totals = self.accelerator.reduce(totals)\n",
        "",
        f"{_TRANSFORMERS_TESTS} -k two_processes",
        "the losses are too large by the number of processes",
    ),
    Mutant(
        _TRANSFORMERS,
        '        vars(trainer.model).pop("_is_accelerate_prepared", None)\n',
        "",
        f"{_TRANSFORMERS_TESTS} -k two_processes",
        "after an evaluation, every process trains a student of its own",
    ),
    Mutant(
        _TRANSFORMERS,
        "attention_mask = self._without_repeats(_attention_mask(inputs))",
        "attention_mask = _attention_mask(inputs)",
        f"{_TRANSFORMERS_TESTS} -k two_processes",
        "the eval KL counts samples twice that complete the last batch of several processes",
    ),
    Mutant(
        _TRANSFORMERS,
        " if name not in self._unreached]",
        "]",
        f"{_TRANSFORMERS_TESTS} -k 'two_processes or plain_gradients'",
        "weight decay shrinks layers that the relation loss does not train",
    ),
    Mutant(
        _TRANSFORMERS,
        "            self.greater_is_better = False\n",
        "            pass\n",
        f"{_TRANSFORMERS_TESTS} -k best_model",
        "load_best_model_at_end loads the model with the largest KL",
    ),
    Mutant(
        _TRANSFORMERS,
        "        self.term.clear()  # forwards without a loss, such as those of generation\n",
        "",
        f"{_TRANSFORMERS_TESTS} -k predictions",
        "training fails after a prediction without labels",
    ),
    Mutant(
        _SENTENCES,
        "        self.term.clear()  # the forwards of evaluators\n",
        "",
        f"{_TESTS} other_forwards",
        "the step after an evaluation fails",
    ),
    Mutant(
        _SENTENCES,
        "self.relation_weight * values.mean()",
        "self.relation_weight * values.sum()",
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
