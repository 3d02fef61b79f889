"""Mutants of the extractor and the students."""

from . import Mutant

_QKV = "minilm_kernels/qkv.py"
_VIEW = "minilm_kernels/_module_view.py"
_RECORDING = "minilm_kernels/recording.py"
_TERM = "minilm_kernels/integrations/relation_term.py"
_STUDENTS = "minilm_kernels/students.py"
_QUICK = "-k 'not compiles and not distributed'"

MUTANTS = [
    Mutant(
        "minilm_kernels/packed/cpu.py",
        "distance.abs() <= window if narrow",
        "distance.abs() < window if narrow",
        "tests/packed/test_attention.py",
        "windows are narrower by one token",
    ),
    Mutant(
        "minilm_kernels/packed/cpu.py",
        "            inner = (grad * out).sum(-1, keepdim=True)  # the sum of p * dp over the keys\n"
        "            grad = grad / (1 - dropout)\n",
        "            grad = grad / (1 - dropout)\n"
        "            inner = (grad * out).sum(-1, keepdim=True)  # the sum of p * dp over the keys\n",
        "tests/packed/test_attention.py -k dropout",
        "the gradient of dropped probabilities is scaled twice",
    ),
    Mutant(
        "minilm_kernels/packed/cpu.py",
        "return x if x.stride(-1) == 1 else x.contiguous()",
        "return x",
        "tests/packed/test_attention.py -k layout",
        "the fused kernel reads other numbers if those of a head are not neighbours",
    ),
    Mutant(
        "minilm_kernels/packed/models.py",
        "sum(module in modes for module in calls)",
        "len(calls)",
        "tests/packed/test_models.py -k another_thread",
        "packed attention is refused while another thread runs another model",
    ),
    Mutant(
        "minilm_kernels/packed/models.py",
        "        dropout=dropout,\n",
        "",
        "tests/packed/test_models.py -k dropout",
        "attention dropout is lost",
    ),
    Mutant(
        "minilm_kernels/packed/models.py",
        "sliding_window - 1,  # it",
        "sliding_window,  # it",
        "tests/packed/test_models.py -k one_call_each",
        "windows of models are wider by one token",
    ),
    Mutant(
        "minilm_kernels/_architectures.py",
        "return layer if layer > 0 else count + 1 + layer",
        "return layer if layer > 0 else count + layer",
        f"tests/test_qkv.py {_QUICK}",
        "the last layer is the one before it",
    ),
    Mutant(
        _QKV,
        "[projection(found[0]) for projection in self.projections]",
        "[p(found[0] if i < 2 else found[0].detach()) for i, p in enumerate(self.projections)]",
        f"tests/test_qkv.py {_QUICK}",
        "no gradient reaches the model through the values",
    ),
    Mutant(
        _QKV,
        "        self.model.train(mode)\n",
        "",
        f"tests/test_qkv.py {_QUICK}",
        "train() and eval() do not reach the model",
    ),
    Mutant(
        _QKV,
        "accepts_loss_kwargs = False",
        "accepts_loss_kwargs = True",
        "tests/test_qkv.py -k accumulation",
        "transformers' Trainer multiplies the gradient by its accumulation steps",
    ),
    Mutant(
        _QKV,
        "        if self.frozen:\n            return self\n",
        "",
        f"tests/test_qkv.py {_QUICK}",
        "train() on a module with a frozen teacher enables the teacher's dropout",
    ),
    Mutant(
        _QKV,
        '            self.__dict__["base"] = pinned(base, made)',
        "            self.base = pinned(base, made)",
        f"tests/test_qkv.py {_QUICK}",
        "a frozen teacher is among the parameters that are trained and saved",
    ),
    Mutant(
        _VIEW,
        "    for name in list(kept)[layer:]:\n        del kept[name]\n",
        "",
        f"tests/test_qkv.py {_QUICK}",
        "modules after the layer remain in the extractor, and are moved, trained and pickled with it",
    ),
    Mutant(
        _VIEW,
        '        twin.__dict__["training"] = False\n',
        "",
        f"tests/test_qkv.py {_QUICK}",
        "a frozen teacher made from a model in training mode has dropout",
    ),
    Mutant(
        _VIEW,
        "        tensors,\n        training=False,",
        "        tensors,",
        f"tests/test_qkv.py {_QUICK}",
        "the dry run uses random numbers for dropout, which changes the following run",
    ),
    Mutant(
        _RECORDING,
        "elif own and torch._C._current_graph_task_id() == -1:",
        "elif own:",
        "tests/test_recording.py -k checkpoint",
        "a recomputation in the backward is recorded as another forward",
    ),
    Mutant(
        _RECORDING,
        "elif own and torch._C._current_graph_task_id() == -1:",
        "elif torch._C._current_graph_task_id() == -1:",
        "tests/test_recording.py -k deep_copy",
        "a deep copy writes into the recordings of the original",
    ),
    Mutant(
        _RECORDING,
        "class _ThreadOutputs(_Outputs, threading.local):",
        "class _ThreadOutputs(_Outputs):",
        "tests/test_recording.py -k threads",
        "threads take one another's recordings",
    ),
    Mutant(
        _RECORDING,
        "                layer.gradient_checkpointing = False\n",
        "",
        "tests/test_recording.py -k checkpointing",
        "recorded layers are checkpointed: no graph, or two recordings",
    ),
    Mutant(
        "minilm_kernels/_architectures.py",
        "x.split([heads * width, key_heads * width, key_heads * width], dim=-1)",
        "x.split([key_heads * width, heads * width, key_heads * width], dim=-1)",
        "tests/test_recording.py -k fused",
        "a fused projection is divided in another order",
    ),
    Mutant(
        "minilm_kernels/_full_attention.py",
        "reason = partial[layer - 1] or",
        "reason = partial[0] or",
        "tests/test_full_attention.py",
        "a layer with local attention is extracted: its relations are not the attention that it uses",
    ),
    Mutant(
        _STUDENTS,
        "sources = [resolve_layer(layer, count) - 1 for layer in layers]",
        "sources = [resolve_layer(layer, count) % count for layer in layers]",
        "tests/test_students.py",
        "each copied layer is the one after the requested layer",
    ),
    Mutant(
        _STUDENTS,
        "4 * hidden_size if intermediate_size is None",
        "3 * hidden_size if intermediate_size is None",
        "tests/test_students.py",
        "students differ from those of the papers",
    ),
    Mutant(
        _STUDENTS,
        "torch.random.default_generator.manual_seed(seed)",
        "torch.random.default_generator.manual_seed(0)",
        "tests/test_students.py",
        "the seed of a random student is ignored",
    ),
    # RelationTerm.
    Mutant(
        _TERM,
        'masks = {"causal": self.causal, **masks}',
        'masks = {"causal": False, **masks}',
        "tests/test_relation_term.py -k causal_values",
        "relations of decoders are not causal",
    ),
    Mutant(
        _TERM,
        "            self.clear()  # otherwise the next step would find the other recordings of this one\n",
        "",
        "tests/test_relation_term.py -k runs_once",
        "an error of one step makes the next one fail, too",
    ),
    Mutant(
        _TERM,
        "        memo[id(self.teacher)] = self.teacher\n",
        "",
        "tests/test_relation_term.py -k copies",
        "each copy of a student has a teacher of its own in memory",
    ),
    Mutant(
        _RECORDING,
        "        if self._eager.calls.get(key, 0) > self._calls[key][0]:\n",
        "        if self._eager.calls.get(key, 0) > self._calls[key][0] and key[1] == 0:\n",
        "tests/test_relation_term.py -k ends_after",
        "the teacher runs to its end although nobody wants its output",
    ),
    Mutant(
        _RECORDING,
        "        if calls <= number:  # torch.compile compiles again for each count\n            self.calls",
        "        if True:\n            self.calls",
        "tests/test_recording.py -k not_popped",
        "torch.compile compiles the model anew for each forward that is not popped",
    ),
    Mutant(
        _STUDENTS,
        "flip(1)[:, :count]",
        "[:, :count]",
        "tests/test_students.py -k pca",
        "embeddings are projected to the directions of least variance",
    ),
    Mutant(
        _STUDENTS,
        "directions * largest.sign()",
        "directions",
        "tests/test_students.py -k directions",
        "the signs of reduced embeddings depend on the library of linear algebra",
    ),
    Mutant(
        "minilm_kernels/vocabulary.py",
        "return lambda token: parts.get(token, ())",
        "return lambda token: ()",
        "tests/test_vocabulary.py",
        "a trimmed BPE tokenizer lacks the merges that build its tokens",
    ),
    Mutant(
        "minilm_kernels/vocabulary.py",
        "tensor[rows] if",
        "tensor[: len(rows)] if",
        "tests/test_vocabulary.py -k trimmed_model",
        "a trimmed student has the embeddings of other tokens",
    ),
]
