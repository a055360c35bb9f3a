"""``python -m tests.reliability.defects``: put deliberate defects into copies of the sources; a fast test finds each.

What is notable here:

- a defect is one edit that a person could make by mistake; everything else of its copy is as it is;
- the test that it names must fail there, and pass without it; both are tried with the real sources;
- what was found is written into ``docs/reliability.md``, and a fast test holds the list to the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.table import DEFECTS, PAGE, ROOT

HEAD = """
Written by `python -m tests.reliability.defects`, which puts each defect into a copy of the sources and runs the test
beside it: it fails there, and passes without the defect. All of these tests belong to `make test`.

| defect | in | found by |
|---|---|---|
"""
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache")
FAILED = 1
"""pytest's exit code where tests ran and one of them failed."""


@dataclass(frozen=True)
class Defect:
    """One wrong edit, and who finds it."""

    says: str
    """What is wrong with it, in words."""
    file: str
    """Relative to the project."""
    old: str
    """Stands exactly once in the file."""
    new: str
    test: str
    """A node of pytest in the fast suite."""

    def broken(self, source: str) -> str:
        """The file's text with the defect. Raises ValueError where ``old`` does not stand there exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file} has {self.old!r} {count} times; allowed: once")
        return source.replace(self.old, self.new)


ALL = (
    # data
    Defect(
        "Class labels begin at 1",
        "data/images/folder.py",
        "number for number, name in enumerate(self.class_names)}",
        "number for number, name in enumerate(self.class_names, 1)}",
        "tests/data/test_images_sources.py::test_folders_are_classes_and_other_files_are_left_out",
    ),
    Defect(
        "A resumed training repeats a batch of images",
        "data/images/module.py",
        'start_batch = int(getattr(module, "batches_seen", 0))',
        'start_batch = max(0, int(getattr(module, "batches_seen", 0)) - 1)',
        "tests/data/test_images_module.py::test_a_trainer_resumes_in_the_middle_of_an_epoch",
    ),
    Defect(
        "A resumed training begins the order of tokens again",
        "data/tokens/module.py",
        'self.seed, getattr(module, "batches_seen", 0), order)',
        "self.seed, 0, order)",
        "tests/pipeline/test_train.py::test_a_resumed_prior_equals_an_uninterrupted_one",
    ),
    Defect(
        "Every process shuffles the tokens in an order of its own",
        "data/tokens/module.py",
        "place = (self.batch_size, rank, world_size, self.seed,",
        "place = (self.batch_size, rank, world_size, self.seed + rank,",
        "tests/data/test_tokens.py::test_ranks_together_take_the_batches_of_one_process",
    ),
    Defect(
        "The hash of a shard is not compared with the manifest's",
        "data/tokens/reader.py",
        "if file_sha256(path) != shard.sha256:",
        "if not path.exists():",
        "tests/data/test_tokens.py::test_verify_finds_a_flipped_bit",
    ),
    Defect(
        "A prefix of tokens takes the last elements",
        "data/layout.py",
        "return Tokens(self.ids[:, :length], self.lengths.clamp(max=length)",
        "return Tokens(self.ids[:, -length:], self.lengths.clamp(max=length)",
        "tests/stages/test_sit.py::test_a_prefix_decodes_to_the_reduced_full_decode",
    ),
    # stages/spectral
    Defect(
        "Haar details have the wrong sign",
        "stages/spectral/haar.py",
        "return mean, mean - second",
        "return mean, second - mean",
        "tests/stages/test_haar.py::test_equals_pywavelets_periodization",
    ),
    # stages/tokenizer
    Defect(
        "A scale-causal encoder looks one scale ahead",
        "stages/tokenizer/transformer.py",
        "return scale[:, None] >= scale[None, :]",
        "return scale[:, None] + 1 >= scale[None, :]",
        "tests/stages/test_sit.py::test_finer_details_leave_coarser_tokens_only_under_a_causal_encoder",
    ),
    Defect(
        "Scales of one codebook come fine to coarse",
        "stages/tokenizer/sit.py",
        "sequence.append(own[:, : scale.length])\n                rest[scale.codebook] = own[:, scale.length :]",
        "sequence.append(own[:, -scale.length :])\n                rest[scale.codebook] = own[:, : -scale.length]",
        "tests/stages/test_sit.py::test_a_small_image_gives_the_first_scales",
    ),
    Defect(
        "FSQ packs even numbers of values one too low",
        "stages/tokenizer/quantizers/fsq.py",
        "self.within(encodings.round()).long() + self.levels // 2)",
        "self.within(encodings.round()).long() + (self.levels - 1) // 2)",
        "tests/stages/test_quantizers.py::test_fsq_reaches_every_code_and_each_id_is_another_vector",
    ),
    Defect(
        "The use of codes is not summed over processes",
        "stages/tokenizer/quantizers/codebook.py",
        "counts = sum_over_ranks(torch.bincount(ids.flatten(), minlength=self.config.codes).float())",
        "counts = torch.bincount(ids.flatten(), minlength=self.config.codes).float()",
        "tests/stages/test_quantizers_ranks.py::test_weights_and_codebooks_are_bit_equal_on_both_ranks",
    ),
    Defect(
        "The perceptual weight counts twice",
        "stages/tokenizer/module.py",
        'raw["perceptual"] = self.perceptual(reconstruction, pixels).mean()',
        'raw["perceptual"] = config.perceptual_weight * self.perceptual(reconstruction, pixels).mean()',
        "tests/pipeline/test_train.py::test_every_loss_counts_by_its_weight_once",
    ),
    # stages/codecs
    Defect(
        "DCT coefficients are cut towards zero, not rounded",
        "stages/codecs/sparse_dct.py",
        "return (x.sign() * _nearest(x.abs())).long()",
        "return (x.sign() * x.abs().floor()).long()",
        "tests/stages/test_sparse_dct.py::test_as_far_from_real_photos_as_libjpeg",
    ),
    Defect(
        "Bit-planes begin one plane too low",
        "stages/codecs/bitplane.py",
        "round(math.log2(self.config.final_threshold)) + 1, 0, self.planes)",
        "round(math.log2(self.config.final_threshold)), 0, self.planes)",
        "tests/stages/test_bitplane.py::test_errors_keep_the_bound_and_the_finest_threshold_is_exact",
    ),
    # stages/conditions
    Defect(
        "Captions are dropped with the class alone",
        "stages/conditions/text.py",
        "return prompts.without(both | label, both | text)",
        "return prompts.without(both | label, both)",
        "tests/stages/test_conditions.py::test_dropping_takes_the_given_share_and_leaves_nothing_of_a_caption",
    ),
    # stages/prior
    Defect(
        "The causal mask lets an element see the next one",
        "stages/attention.py",
        "dtype=torch.bool).tril()",
        "dtype=torch.bool).tril(1)",
        "tests/stages/test_prior.py::test_later_tokens_do_not_matter",
    ),
    Defect(
        "Training drops no condition",
        "stages/prior/module.py",
        "prompts = self.prior.condition.drop(Prompts.from_batch(batch))",
        "prompts = Prompts.from_batch(batch)",
        "tests/pipeline/test_train.py::test_conditions_are_dropped_in_training_and_in_validation_never",
    ),
    Defect(
        "Guidance has the wrong sign",
        "stages/prior/sampling.py",
        "weight = guidance_at(settings, position, layout.length)\n"
        "                    logits = unconditional + weight * (conditional - unconditional)",
        "weight = guidance_at(settings, position, layout.length)\n"
        "                    logits = unconditional - weight * (conditional - unconditional)",
        "tests/stages/test_sampling.py::test_guidance_moves_the_odds_as_the_formula_says",
    ),
    Defect(
        "The seed of a sample depends on its place in the batch",
        "stages/prior/sampling.py",
        "[torch.Generator().manual_seed(seed) for seed in seeds]",
        "[torch.Generator().manual_seed(seed + place) for place, seed in enumerate(seeds)]",
        "tests/stages/test_sampling.py::test_one_seed_gives_one_image_whatever_the_batch",
    ),
    # stages/measures
    Defect(
        "The covariance of a Fréchet distance is divided by N",
        "stages/measures/frechet.py",
        "centred.T @ centred / (len(features) - 1)",
        "centred.T @ centred / len(features)",
        "tests/stages/test_measures.py::test_frechet_equals_the_general_square_root",
    ),
    # pipeline
    Defect(
        "The tokenizer's trained weights are exported, not their average",
        "pipeline/train.py",
        "tokenizer = module.average.module",
        "tokenizer = module.tokenizer",
        "tests/pipeline/test_train.py::test_the_exported_weights_are_the_average_over_the_trained_ones",
    ),
    Defect(
        "The prior's trained weights are exported, not their average",
        "pipeline/train.py",
        "weights = whole_state(module.average.module)",
        "weights = whole_state(module.prior)",
        "tests/pipeline/test_train.py::test_the_exported_prior_is_the_average_over_the_trained_ones",
    ),
    Defect(
        "A prior is trained on the tokens of another tokenizer",
        "pipeline/train.py",
        "check_belongs(manifest, config.tokenizer.path, tokens_sha256(config.tokenizer.path))",
        "pass",
        "tests/pipeline/test_commands.py::test_parts_that_do_not_belong_together_are_refused",
    ),
    Defect(
        "Mirrored views are stored without the manifest saying so",
        "pipeline/cache.py",
        "views=VIEWS if config.images.flip else VIEWS[:1],",
        "views=VIEWS[:1],",
        "tests/pipeline/test_cache.py::test_reader_gives_every_image_once_with_its_own_tokens",
    ),
    Defect(
        "The order of a cache depends on the number of processes",
        "pipeline/encoding.py",
        "order.source_order(len(source), config.tokens.permutation_seed)",
        "order.source_order(len(source), config.tokens.permutation_seed + config.trainer.devices - 1)",
        "tests/pipeline/test_cache.py::test_two_processes_write_the_same_bytes_though_one_has_no_shard",
    ),
)


def copied(folder: Path) -> Path:
    """The project's sources in ``folder``, without environments, runs and caches."""
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT))


def tried(place: Path, nodes: Iterable[str]) -> int:
    """pytest's exit code for the ``nodes``, of the fast suite, with the sources in ``place``."""
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, *dict.fromkeys(nodes)]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True).returncode


def found(defect: Defect) -> bool:
    """Whether the test of a defect fails with it. Raises ValueError where the defect does not fit the sources."""
    with tempfile.TemporaryDirectory() as folder:
        place = copied(Path(folder))
        path = place / defect.file
        path.write_text(defect.broken(path.read_text(encoding="utf-8")), encoding="utf-8")
        return tried(place, [defect.test]) == FAILED


def passes_without(defects: Sequence[Defect]) -> bool:
    """Whether the tests of all defects pass with the sources as they are."""
    with tempfile.TemporaryDirectory() as folder:
        return tried(copied(Path(folder)), [defect.test for defect in defects]) == 0


def row(defect: Defect) -> str:
    """A defect's line of the page."""
    file, _, test = defect.test.removeprefix("tests/").partition("::")
    return f"| {defect.says} | `{defect.file}` | `{file.removesuffix('.py')}: {test}` |"


if __name__ == "__main__":
    if not passes_without(ALL):
        sys.exit("a test that should find a defect fails without one")
    missed = []
    for each in ALL:
        result = found(each)
        print(f"{'found ' if result else 'MISSED'}  {each.says}  ({each.test})", flush=True)
        missed += [] if result else [each]
    if missed:
        sys.exit(f"{len(missed)} of {len(ALL)} defects were not found")
    before = PAGE.read_text(encoding="utf-8").partition(DEFECTS)[0]
    PAGE.write_text(before + DEFECTS + HEAD + "\n".join(map(row, ALL)) + "\n", encoding="utf-8")
    print(f"all {len(ALL)} defects were found")
