"""What the tests hold: faults put into the code on purpose, each of which must turn a test red.

    python -m tests.mutations [FILE…]      all of them, or those of the files named

Each mutation is a file of the product, a piece of its text, what stands there instead, and the
tests that are to notice. The tree is copied to a temporary folder, one mutation is applied to the
copy, and its tests run there; the checkout is never touched. A mutation is

* red        where one of its tests fails: that is what it is for;
* survived   where none does: a hole in the tests;
* broken     where the tests cannot run (the mutated code has no meaning), or take too long;
* gone       where its text is not in the file exactly once: the code has moved on, and so must it.

A mutation that changes nothing anybody could notice is none: it has no place here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("files", "kernels", "lora", "models", "data", "train")
AT_ONCE = 2
_SECONDS = 180
_NONE_CHOSEN = 5  # pytest's exit code
# Faults of the mutation itself, which any test would meet.
_NONSENSE = re.compile(r"- (NameError|UnboundLocalError|SyntaxError|ImportError|AttributeError)")


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        path: The file it is put into, from the root.
        why: What is wrong with it.
        old: The text that it takes the place of; it stands in the file exactly once.
        new: The text put there.
        tests: The pytest ids that must not all pass.
    """

    path: str
    why: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: `red`, `survived`, `broken` or `gone`, and pytest's last words."""

    mutation: Mutation
    result: str
    words: str
    seconds: float


def _of(path: str, tests: str, *mutations: tuple[str, ...]) -> list[Mutation]:
    """Return the mutations of a file.

    Args:
        path: The file.
        tests: The test file that most of them are for.
        mutations: (why, old, new, test, …); a test is a name in `tests`, or a whole pytest id.
    """
    return [
        Mutation(path, why, old, new, tuple(t if "::" in t else f"{tests}::{t}" for t in names))
        for why, old, new, *names in mutations
    ]


MUTATIONS = [
    # --- files -----------------------------------------------------------------------------------
    *_of(
        "files/atomic.py",
        "tests/files/test_atomic.py",
        (
            "a file has its name before its bytes are on the disk",
            "                os.fsync(file.fileno())\n",
            "",
            "test_the_new_content_is_on_the_disk_before_the_rename_and_the_folder_after",
        ),
        (
            "what Python still holds back is not flushed before the sync",
            "                file.flush()\n",
            "",
            "test_all_bytes_are_with_the_system_when_it_is_asked_to_sync",
        ),
        (
            "the rename itself is not brought to the disk",
            "            raise\n        fsync_folder(destination.parent)\n",
            "            raise\n",
            "test_the_new_content_is_on_the_disk_before_the_rename_and_the_folder_after",
        ),
        (
            "a file of the temporary name is written through",
            "os.O_RDWR | os.O_CREAT | os.O_EXCL",
            "os.O_RDWR | os.O_CREAT",
            "test_nothing_is_written_through_what_lies_at_the_temporary_name",
        ),
        (
            "a symbolic link is replaced instead of the file that it names",
            "destination = Path(os.path.realpath(path))",
            "destination = Path(os.path.abspath(path))",
            "test_a_symbolic_link_stays_and_its_file_is_replaced",
        ),
        (
            "the permissions of a replaced file are lost",
            "    return stat.S_IMODE(mode)\n",
            "    return None\n",
            "test_permissions_follow_the_umask_or_the_file_that_was_there",
        ),
        (
            "a broken-off write leaves its temporary file",
            "            temporary.unlink(missing_ok=True)\n            raise\n",
            "            raise\n",
            "test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else",
        ),
        (
            "a full disk names no file",
            "        raise OSError(error.errno, error.strerror, str(path)) from error\n",
            "        raise\n",
            "test_a_full_disk_names_the_file_and_leaves_the_old_one",
        ),
    ),
    *_of(
        "files/folders.py",
        "tests/files/test_folders.py",
        (
            "no file of a folder is synced before the folder has its name",
            "            fsync_file(path)\n",
            "            pass\n",
            "test_all_is_on_the_disk_before_the_folder_has_its_name",
            "tests/train/test_checkpoint.py::test_an_old_checkpoint_goes_when_the_new_one_is_on_the_disk",
        ),
        (
            "the names in a folder are not synced before it has its own",
            "            fsync_file(path)\n        fsync_folder(temporary)\n",
            "            fsync_file(path)\n",
            "test_all_is_on_the_disk_before_the_folder_has_its_name",
        ),
        (
            "a folder's rename is not synced",
            'faultpoint("folder.renamed")\n    fsync_folder(target.parent)\n',
            'faultpoint("folder.renamed")\n',
            "test_all_is_on_the_disk_before_the_folder_has_its_name",
        ),
        (
            "the old folder is deleted before the new one has its name",
            "        target.rename(trash)\n",
            "        shutil.rmtree(target)\n",
            "test_all_is_on_the_disk_before_the_folder_has_its_name",
        ),
        (
            "an error leaves half a folder",
            "        shutil.rmtree(temporary, ignore_errors=True)\n        raise\n",
            "        raise\n",
            "test_an_error_leaves_the_old_folder_and_nothing_beside_it",
        ),
        (
            "after a kill between two renames the old folder is taken, not the new one",
            "(temporary if temporary.is_dir() else trash).rename(target)",
            "(trash if trash.is_dir() else temporary).rename(target)",
            "test_a_kill_while_a_folder_is_replaced_loses_neither",
        ),
        (
            "a recovered folder's name is not synced",
            "else trash).rename(target)\n    fsync_folder(target.parent)\n",
            "else trash).rename(target)\n",
            "test_a_recovered_folder_s_name_is_on_the_disk",
        ),
        (
            "what a kill left half-deleted stays",
            '    for prefix in (".tmp-", ".trash-"):\n',
            '    for prefix in (".tmp-",):\n',
            "test_a_sweep_takes_what_a_kill_left_and_nothing_else",
        ),
        (
            "a changed byte is not noticed",
            "whole = path.stat().st_size == size and sha256_file(path) == digest",
            "whole = path.stat().st_size == size",
            "test_every_flipped_bit_and_every_truncation_is_noticed[optimizer.safetensors]",
        ),
        (
            "a manifest is believed without its own hash",
            "own != _hash_of(manifest) or as_written",
            "as_written",
            "test_every_flipped_bit_and_every_truncation_is_noticed[manifest.json]",
        ),
        (
            "a manifest that is not written as ours is believed",
            " or as_written != path.read_bytes()",
            "",
            "test_every_flipped_bit_and_every_truncation_is_noticed[manifest.json]",
        ),
        (
            "a surplus file is not noticed",
            "    if present != set(listed):\n",
            "    if not present >= set(listed):\n",
            "test_missing_and_surplus_files_are_damage",
        ),
        (
            "files are read again to be hashed though their hash is known",
            "hashes.get(path.name) or sha256_file(path)",
            "sha256_file(path)",
            "test_a_file_whose_hash_is_known_is_not_read_again",
        ),
    ),
    *_of(
        "files/tensors.py",
        "tests/files/test_tensors.py",
        (
            "a tensor that lies turned is written as it lies",
            'to("cpu", _stored_dtype(tensor, dtype)).contiguous()\n',
            'to("cpu", _stored_dtype(tensor, dtype))\n'
            "    host = host.as_strided((host.numel(),), (1,))\n",
            "test_any_stride_is_written_in_row_major_order",
        ),
        (
            "integers are cast with the floats",
            "dtype if dtype is not None and tensor.is_floating_point() else",
            "dtype if dtype is not None else",
            "test_floats_are_cast_on_the_way_and_integers_are_not",
        ),
        (
            "narrow tensors come first, so that wide ones are not aligned",
            "(-_stored_dtype(tensors[name], dtype).itemsize, name)",
            "(_stored_dtype(tensors[name], dtype).itemsize, name)",
            "test_the_digest_is_the_files_and_every_tensor_is_aligned",
        ),
        (
            "the hash leaves out the header",
            "digest = hashlib.sha256(start)",
            "digest = hashlib.sha256()",
            "test_the_digest_is_the_files_and_every_tensor_is_aligned",
        ),
        (
            "tensors pile up that are still to be hashed",
            "            hashed.result()\n",
            "",
            "test_one_tensor_at_a_time_is_held_however_slow_the_hash",
        ),
        (
            "the header is not padded, so that no tensor is aligned",
            'return text + b" " * (-len(text) % 8)',
            "return text",
            "test_the_digest_is_the_files_and_every_tensor_is_aligned",
        ),
        (
            "of two tensors of one name the last is read",
            'entries = parse_json_object(text, f"{path}: header")',
            "entries = json.loads(text)",
            "test_malformed_files_end_in_one_sentence_naming_the_file",
        ),
        (
            "quantised weights are read as if they were weights",
            "if not isinstance(kind, str) or kind not in _DTYPES:",
            "if not isinstance(kind, str):",
            "test_malformed_files_end_in_one_sentence_naming_the_file",
        ),
        (
            "what the library refuses has a traceback",
            "            except SafetensorError as error:\n",
            "            except EOFError as error:\n",
            "test_malformed_files_end_in_one_sentence_naming_the_file",
        ),
    ),
    *_of(
        "files/hub.py",
        "tests/files/test_hub.py",
        (
            "weights are read beside the index that leaves them out",
            "    if indexed and not missing:\n        return indexed\n",
            "    if indexed and not missing:\n"
            "        return sorted({*indexed, *(n for n in top if _WEIGHTS.fullmatch(n))})\n",
            "test_the_index_decides_what_is_fetched_whatever_the_names",
            "tests/models/test_weights.py::test_the_files_of_an_index_may_have_any_name",
        ),
        (
            "a file that the index names is missing, and nobody says so",
            "    missing = [name for name in indexed if name not in top]\n",
            "    missing: list[str] = []\n",
            "test_a_refusal_is_one_sentence_with_its_remedy",
        ),
        (
            "damage of a large file in the cache is not noticed",
            " and blob.name != digest:",
            " and not digest:",
            "test_damage_in_the_cache_is_noticed_by_the_name_of_the_blob",
        ),
    ),
    *_of(
        "files/fetch.py",
        "tests/files/test_hub.py",
        (
            "a file that arrived damaged is used",
            "    if actual != expected:\n",
            "    if False:\n",
            "test_a_refusal_is_one_sentence_with_its_remedy",
        ),
        (
            "a damaged file stays in the cache, and is found there again",
            "        blob_path.unlink(missing_ok=True)\n",
            "",
            "test_a_damaged_file_is_gone_from_the_cache_and_fetched_again",
        ),
    ),
    # --- kernels ---------------------------------------------------------------------------------
    *_of(
        "kernels/loss.py",
        "tests/kernels/test_linear_cross_entropy.py",
        (
            "the head's gradient is added up over chunks in the type of the weight",
            "torch.zeros_like(weight, dtype=exact) if needs_weight",
            "torch.zeros_like(weight) if needs_weight",
            "test_the_weight_s_gradient_adds_up_over_chunks_in_fp32",
        ),
        (
            "losses are added up in the type of the states",
            "losses = hidden.new_empty(len(targets), dtype=exact)",
            "losses = hidden.new_empty(len(targets))",
            "test_bf16_is_finite_and_close",
        ),
        (
            "only the last chunk reaches the head's gradient",
            "grad_weight.addmm_(grad_logits.t(), hidden[chunk])",
            "grad_weight.addmm_(grad_logits.t(), hidden[chunk], beta=0)",
            "test_value_and_gradients",
        ),
        (
            "the gradient scale is left in the gradients",
            "left = grads[0] / ctx.gradient_scale",
            "left = grads[0]",
            "test_the_gradient_scale_cancels",
        ),
        (
            "the factor on the loss does not reach the gradients",
            "left = grads[0] / ctx.gradient_scale",
            "left = torch.ones_like(grads[0]) / ctx.gradient_scale",
            "test_value_and_gradients",
        ),
        (
            "the softmax is taken of logits as they are, and overflows",
            "    largest = wanted.amax(1, keepdim=True)\n",
            "    largest = torch.zeros_like(target_logits)\n",
            "test_logits_of_any_size_stay_finite",
        ),
        (
            "fp16 gradients are made without the scale",
            "    wanted.div_(total / scale)\n"
            "    wanted.scatter_add_(1, index, torch.full_like(target_logits, -scale))\n"
            "    if weights is not None:\n"
            "        wanted.mul_(weights[:, None])\n"
            "    gradient[len(targets) :] = 0\n"
            "    return losses.squeeze(1), gradient.to(logits.dtype)",
            "    wanted.div_(total)\n"
            "    wanted.scatter_add_(1, index, torch.full_like(target_logits, -1))\n"
            "    gradient[len(targets) :] = 0\n"
            "    return losses.squeeze(1), gradient.to(logits.dtype) * scale",
            "test_small_fp16_gradients_live_by_the_scale",
        ),
        (
            "a row's weight is in its loss, and not in its gradient",
            "        wanted.mul_(weights[:, None])\n",
            "        pass\n",
            "test_weights_multiply_the_loss_and_the_gradient_of_each_row",
        ),
        (
            "every chunk has the weights of the first",
            "some = None if weights is None else weights[chunk]",
            "some = None if weights is None else weights[: len(targets[chunk])]",
            "test_weights_multiply_the_loss_and_the_gradient_of_each_row",
        ),
        (
            "rows behind the targets get a gradient",
            "    gradient[len(targets) :] = 0\n",
            "",
            "test_rows_that_only_repeat_a_shape_count_for_nothing",
        ),
        (
            "gradients of hidden states go to the wrong rows",
            "index_copy_(0, rows, scaled)",
            "index_copy_(0, rows.flip(0), scaled)",
            "test_value_and_gradients",
        ),
        (
            "a chunk holds twice what memory was promised",
            "rows = _LOGITS_BYTES // (vocabulary * dtype.itemsize)",
            "rows = _LOGITS_BYTES // (vocabulary * dtype.itemsize // 2)",
            "test_a_chunk_is_as_long_as_its_memory_allows",
        ),
    ),
    *_of(
        "kernels/attention.py",
        "tests/kernels/test_attention.py",
        (
            "a window is one key too wide",
            "visible & (key > query - window)",
            "visible & (key >= query - window)",
            "test_attention_stays_inside_documents_and_windows",
        ),
        (
            "queries see one key of the future",
            "    visible = key <= query\n",
            "    visible = key <= query + 1\n",
            "test_attention_stays_inside_documents_and_windows",
        ),
        (
            "the cache's keys are cut one too short for the window",
            "cache_length - window + 1",
            "cache_length - window + 2",
            "test_attention_behind_a_cache",
        ),
        (
            "attention is dropped where nothing is to be",
            "    if segments.dropout_rows is None:\n        dropout = 0.0\n",
            "    if segments.dropout_rows is None:\n        dropout = dropout\n",
            "test_attention_dropout_needs_a_draw",
        ),
    ),
    *_of(
        "kernels/cpu/attention.py",
        "tests/kernels/test_attention.py",
        (
            "blocks leave out the first key of a window",
            "max(0, low - window + 1)",
            "max(0, low - window + 2)",
            "test_blocks_are_the_whole",
        ),
        (
            "blocks make their scores in bf16",
            "        exact = torch.promote_types(q.dtype, torch.float32)\n",
            "        exact = q.dtype\n",
            "test_under_autocast_scores_stay_in_fp32",
        ),
        (
            "the gradient by the keys is not scaled",
            "return d_q.mul_(scale), d_k.mul_(scale), d_v",
            "return d_q.mul_(scale), d_k, d_v",
            "test_attention_gradient",
        ),
        (
            "blocks forget what earlier blocks gave the keys",
            "d_k_[:, seen] += torch.bmm",
            "d_k_[:, seen] = torch.bmm",
            "test_blocks_are_the_whole",
        ),
        (
            "rows of no document let gradients through",
            ".index_fill_(0, layout.pads, 0)",
            "",
            "tests/train/test_accumulation.py::test_attention_in_rounded_blocks_is_that_without",
        ),
    ),
    *_of(
        "kernels/attention.py",
        "tests/kernels/test_varlen.py",
        (
            "documents of one length with a window want a mask of T × T",
            "one_call = drops or windowed or",
            "one_call = drops or",
            "test_which_way_is_a_rule_of_the_device_and_the_sizes",
        ),
        (
            "with dropout every document is a call of its own",
            "one_call = drops or windowed or",
            "one_call = not drops and windowed or not drops and",
            "test_which_way_is_a_rule_of_the_device_and_the_sizes",
        ),
        (
            "the layers' fused dropout draws one mask",
            "fold(segments.dropout_seed, module)",
            "segments.dropout_seed",
            "test_dropout_is_drawn_anew_by_seed_step_micro_batch_and_layer_alone",
        ),
    ),
    *_of(
        "kernels/varlen.py",
        "tests/kernels/test_varlen.py",
        (
            "torch's kernel is told a window that is one key too wide",
            "behind = -1 if window is None else window - 1",
            "behind = -1 if window is None else window",
            "test_one_call_is_told_documents_window_heads_and_dropout",
        ),
        (
            "torch's kernel is told of no dropout",
            "dropout_p=dropout",
            "dropout_p=0.0",
            "test_one_call_is_told_documents_window_heads_and_dropout",
        ),
        (
            "the longest document is asked of the device",
            "max(*segments.rows, segments.tail)",
            "int(segments.boundaries.diff().max())",
            "tests/train/test_no_waits.py::test_a_step_asks_the_device_for_nothing_up_to_its_norm",
        ),
        (
            "queries see the future in a window",
            "window_size_right=0",
            "window_size_right=1",
            "test_one_call_is_told_documents_window_heads_and_dropout",
        ),
        (
            "key heads are repeated for torch's kernel",
            "    out, *_ = torch.ops",
            "    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1) for x in (k, v))\n"
            "    out, *_ = torch.ops",
            "test_one_call_is_told_documents_window_heads_and_dropout",
        ),
    ),
    *_of(
        "kernels/segments.py",
        "tests/kernels/test_varlen.py",
        (
            "the rows behind the last document are in none of attention's",
            "(*rows, tail) if tail else rows",
            "rows",
            "test_one_call_is_told_documents_window_heads_and_dropout",
        ),
    ),
    *_of(
        "kernels/operands.py",
        "tests/kernels/test_linears.py",
        (
            "gradients of adapters on CUDA are rounded to half precision",
            "return torch.mm(left, right, out_dtype=torch.float32)",
            "return torch.mm(left, right)",
            "test_a_gradient_on_cuda_is_the_product_s_fp32_sum",
        ),
    ),
    *_of(
        "kernels/dora.py",
        "tests/kernels/test_dora.py",
        (
            "DoRA's base sees the dropped input",
            "y = F.linear(x, w)",
            "y = F.linear(kept, w)",
            "test_output_and_gradients_are_the_formulas[0.4-False-False]",
        ),
        (
            "DoRA's magnitudes see no dropout in the backward pass",
            "turned = F.linear(kept, w)",
            "turned = F.linear(x, w)",
            "test_output_and_gradients_are_the_formulas[0.4-False-False]",
        ),
        (
            "DoRA's magnitudes learn nothing from the low-rank part",
            "turned + scale * (d_lifted * b).sum(1)",
            "turned",
            "test_output_and_gradients_are_the_formulas[0.0-False-False]",
        ),
        (
            "DoRA's norms are those of the base",
            "b_rows, a, alpha=scale",
            "b_rows, a, alpha=0",
            "test_norms_are_made_in_blocks",
        ),
    ),
    *_of(
        "kernels/linears.py",
        "tests/kernels/test_linears.py",
        (
            "layers of one input make and keep a copy of it each",
            "    if times == 1 or x.dtype == (dtype := compute_dtype(x)):\n",
            "    if True:\n",
            "test_under_autocast_an_input_is_lowered_and_kept_once",
        ),
        (
            "gradients of one copy are added in half precision",
            "total = grads[-1].to(ctx.dtype)",
            "total = grads[-1].clone()",
            "test_under_autocast_an_input_is_lowered_and_kept_once",
        ),
    ),
    *_of(
        "kernels/reference.py",
        "tests/models/test_autocast.py",
        (
            "CUDA's autocast makes a LayerNorm in fp32",
            "    with _without_autocast(x):\n        return F.layer_norm",
            "    if True:\n        return F.layer_norm",
            "test_layer_norm_stays_in_the_type_of_its_input",
        ),
    ),
    *_of(
        "kernels/dropout.py",
        "tests/kernels/test_dropout.py",
        (
            "the module plays no part in a mask",
            "columns ^ signed(mix(module))",
            "columns ^ signed(mix(0))",
            "test_masks_that_differ_in_one_part_of_the_key_are_independent",
        ),
        (
            "p and 1 - p are exchanged",
            "round((1 - p) * 2**32)",
            "round(p * 2**32)",
            "test_keep_rate_of_the_whole_and_of_each_row_and_column",
        ),
        (
            "what is kept is not scaled",
            "return keep(x, mask).mul_(1 / (1 - p))",
            "return keep(x, mask)",
            "test_dropout_scales_what_it_keeps_and_its_gradient_alike",
        ),
        (
            "the gradient of what is kept is not scaled",
            "return keep(grads[0], mask).mul_(1 / (1 - ctx.p)), None, None",
            "return keep(grads[0], mask), None, None",
            "test_dropout_scales_what_it_keeps_and_its_gradient_alike",
        ),
        (
            "a dropped NaN stays one",
            "return (x.view(_BITS[x.dtype]) * mask.view(torch.int8)).view(x.dtype)",
            "return x * mask",
            "test_every_type_is_dropped_alike_and_what_is_dropped_is_zero",
        ),
        (
            "one multiplier has another bit",
            "_MULTIPLIER_2 = 0x846CA68B - 2**32",
            "_MULTIPLIER_2 = 0x846CA68D - 2**32",
            "test_host_and_tensor_mix_agree",
        ),
        (
            "heads of attention share a mask",
            "mix_words(rows[:, None] ^ numbers[:, None])",
            "mix_words(rows[:, None] ^ (numbers * 0)[:, None])",
            "test_heads_and_keys_of_attention_are_independent",
        ),
        (
            "the high word of a seed plays no part",
            "(value & WORD, value >> 32 & WORD)",
            "(value & WORD, value & WORD)",
            "tests/kernels/test_segments.py::test_golden_keys",
        ),
    ),
    *_of(
        "kernels/segments.py",
        "tests/kernels/test_segments.py",
        (
            "positions go on from document to document",
            "return torch.cat([torch.arange(count) for count in rows])",
            "return torch.arange(sum(rows))",
            "test_documents_end_to_end",
        ),
        (
            "the step plays no part in a draw",
            "step_key = fold(fold(0, seed), step)",
            "step_key = fold(fold(0, seed), 0)",
            "test_every_part_of_the_key_matters",
        ),
        (
            "the example plays no part in a draw",
            "keys = [fold(step_key, example) for example in examples]",
            "keys = [fold(step_key, 0) for example in examples]",
            "test_every_part_of_the_key_matters",
        ),
        (
            "draws behind a cache begin at position 0",
            "_draw(draw, examples, all_rows, positions + offset)",
            "_draw(draw, examples, all_rows, positions)",
            "test_row_keys_belong_to_example_and_position_whatever_the_layout",
        ),
        (
            "an empty document is taken",
            "if not lengths or min(lengths) < 1:",
            "if not lengths:",
            "test_bad_layouts_are_refused",
        ),
    ),
    *_of(
        "kernels/linears.py",
        "tests/kernels/test_linears.py",
        (
            "the adapter is not scaled",
            "alpha=scale / (1 - p))",
            "alpha=1 / (1 - p))",
            "test_linears_share_an_input",
        ),
        (
            "what could be made again is kept on every device",
            "and not remake else made_again(x, operands)\n",
            "and not remake else None\n",
            "tests/models/test_layers.py::test_making_the_inputs_of_linears_again_changes_no_bit",
        ),
        (
            "a weight that is trained reads the source of its input",
            "isinstance(x, Made) or any(layer.weight.requires_grad for layer in operands)",
            "isinstance(x, Made)",
            "tests/kernels/test_triton_inputs.py::test_an_input_is_kept_where_weights_are_trained",
        ),
        (
            "B's gradient alone is rounded to half precision",
            "d_b = gradient_product(low_rank.t(), dy)",
            "d_b = torch.mm(low_rank.t(), dy)",
            "test_no_gradient_of_a_parameter_is_rounded_to_half_precision",
        ),
        (
            "the base sees the dropped input too",
            "low_rank = torch.mm(x if mask is None else keep(x, mask), a.t())",
            "x = x if mask is None else keep(x, mask)\n"
            "                    low_rank = torch.mm(x, a.t())\n"
            "                    y = F.linear(x, weight, None if bias is None else bias.to(dtype))",
            "test_adapter_alone_sees_dropped_input",
        ),
        (
            "A's gradient sees the input without its mask",
            "gradient_product(d_low_rank.t(), kept) if needs_a",
            "gradient_product(d_low_rank.t(), x) if needs_a",
            "test_every_gradient_is_that_of_the_formula",
        ),
        (
            "B's gradient is not scaled",
            "gradient_product(low_rank.t(), dy).mul_(scale / (1 - p))",
            "gradient_product(low_rank.t(), dy)",
            "test_every_gradient_is_that_of_the_formula",
        ),
        (
            "the gradient through an adapter passes what was dropped",
            "dx.add_(keep(torch.mm(d_low_rank, a), mask))",
            "dx.add_(torch.mm(d_low_rank, a))",
            "test_every_gradient_is_that_of_the_formula",
        ),
        (
            "the input's gradient is that of the last layer alone",
            "return torch.mm(dy, weight) if total is None else total.addmm_(dy, weight)",
            "return torch.mm(dy, weight)",
            "test_every_gradient_is_that_of_the_formula",
        ),
    ),
    *_of(
        "kernels/reference.py",
        "tests/kernels/test_reference.py",
        (
            "RMSNorm's epsilon stands outside the root",
            ".add_(eps).rsqrt_()",
            ".rsqrt_().add_(eps)",
            "test_rms_norm",
        ),
        (
            "RMSNorm rounds after the weight has come in",
            "return (exact * inverse).to(x.dtype) * weight",
            "return (exact * inverse * weight).to(x.dtype)",
            "test_rms_norm_rounds_before_the_weight_comes_in",
        ),
        (
            "RMSNorm's gradient leaves out the norm's own",
            "torch.addcmul(d_normed, normed, mean, value=-1)",
            "torch.addcmul(d_normed, normed, mean, value=0)",
            "test_rms_norm_gradient",
        ),
        (
            "GELU in its exact form",
            'F.gelu(x, approximate="tanh")',
            "F.gelu(x)",
            "test_activations",
        ),
        (
            "the backward pass of rotary turns forward",
            "_rotate(grads[0], cos, sin, -1.0)",
            "_rotate(grads[0], cos, sin, 1.0)",
            "test_rotary_gradient_and_types",
        ),
        (
            "rotary turns neighbours the other way round",
            "torch.cat((-sin_low, sin_high), -1)",
            "torch.cat((sin_low, -sin_high), -1)",
            "test_rotary_turns_the_two_halves_against_each_other",
        ),
        (
            "SwiGLU's two inputs exchange their gradients",
            "        return d_gate, F.silu(gate).mul_(grads[0])\n",
            "        return F.silu(gate).mul_(grads[0]), d_gate\n",
            "test_swiglu_gradient",
        ),
    ),
    *_of(
        "kernels/cpu/rounding.py",
        "tests/kernels/test_rounding.py",
        (
            "a quarter of the rows may be pads",
            "rows.bit_length() - 4",
            "rows.bit_length() - 3",
            "test_at_most_an_eighth_is_wasted_and_few_sizes_are_left",
        ),
        (
            "fp32 is rounded too",
            'return library(device, dtype) == "oneDNN"',
            'return library(device, dtype) in ("oneDNN", "MKL")',
            "test_nothing_else_is_rounded",
        ),
        (
            "a step on CUDA has sizes that no step had",
            "        return _ROWS_OF_A_TILE\n",
            "        return 1\n",
            "test_rows_on_cuda_fill_their_last_tile",
        ),
    ),
    *_of(
        "kernels/dispatch.py",
        "tests/kernels/test_dispatch.py",
        (
            "triton where it cannot run falls back in silence",
            '    if device.type != "cuda" and not interpreted:\n        raise UserError(',
            '    if device.type != "cuda" and not interpreted:\n        return _REFERENCE\n'
            "        raise UserError(",
            "test_triton_says_what_to_use_instead",
        ),
        (
            "a CPU attends as a GPU does",
            'return _REFERENCE_ON_CPU if device.type == "cpu" else _REFERENCE',
            "return _REFERENCE",
            "test_reference_is_what_there_is",
        ),
        (
            "auto takes Triton without a record of its gain",
            "    if not gains or not installed:",
            "    if not installed:",
            "tests/kernels/test_triton_launch.py::test_auto_takes_what_gains_on_a_class_of_device",
        ),
        (
            "auto takes Triton against what a card's records say",
            "    if installed and not launch.decided(device) and _compiles_for(device):",
            "    if installed and _compiles_for(device):",
            "test_records_of_a_card_decide_what_auto_takes",
        ),
        (
            "auto takes kernels that no compile test has tried",
            "return torch.cuda.get_device_capability(device) >= (8, 0)",
            "return torch.cuda.get_device_capability(device) >= (7, 0)",
            "test_auto_takes_triton_on_a_card_that_no_record_tells_of",
        ),
    ),
    *_of(
        "kernels/triton/norms.py",
        "tests/kernels/test_triton.py",
        (
            "the gradient of a wide row's change is not dropped",
            "d_change = add_dropped(None, d_x.to(ctx.change_dtype), apart)",
            "d_change = d_x.to(ctx.change_dtype)",
            "test_norms_with_a_dropped_addition",
        ),
        (
            "RMSNorm in Triton rounds after the weight has come in",
            "normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight",
            "normed * weight",
            "test_rms_norm_rounds_before_the_weight_comes_in",
        ),
        (
            "the residual stream's own gradient is lost",
            "            d_x += tl.load(d_total_ptr",
            "            d_x += 0.0 * tl.load(d_total_ptr",
            "test_norms_with_an_addition",
        ),
        (
            "what the residual stream drops is not dropped from its gradient",
            "            d_change = dropped(d_change, tl.load(rows_ptr + row), keys,",
            "            d_change, _ = d_change, (tl.load(rows_ptr + row), keys,",
            "test_norms_with_a_dropped_addition",
        ),
        (
            "the mask of a change that nothing normalises is forgotten backward",
            "                d_change = add_dropped(None, d_change.to(ctx.change_dtype), draw)\n",
            "                pass\n",
            "test_a_change_of_a_stream_that_nothing_normalises_is_dropped_backward_too",
        ),
        (
            "the mean's part of LayerNorm's gradient is left out",
            "            d_x -= tl.sum(gradient, axis=0) / width\n",
            "            d_x -= 0.0\n",
            "test_layer_norm",
        ),
        (
            "the weight's gradient is that of a program's last row",
            "            d_weight += d_out * normed\n",
            "            d_weight = d_out * normed\n",
            "test_rms_norm",
        ),
    ),
    *_of(
        "kernels/triton/dropout.py",
        "tests/kernels/test_triton.py",
        (
            "an adapter without dropout drops a word in four thousand million",
            "(word < limit) | (limit == 0x7FFFFFFF)",
            "word < limit",
            "tests/kernels/test_triton_linears.py::test_an_adapter_without_dropout_keeps_every_word_beside_one_with",
        ),
        (
            "what is kept of a change is not scaled",
            "scaled = (values.to(tl.float32) * factor).to(values.dtype)",
            "scaled = values",
            "test_norms_with_a_dropped_addition",
        ),
        (
            "what is dropped and infinite makes the sum infinite",
            "return tl.where(kept(row_key.to(tl.uint32, bitcast=True), keys, limit), scaled, 0.0)",
            "return scaled * kept(row_key.to(tl.uint32, bitcast=True), keys, limit)",
            "test_addition_of_what_is_dropped",
        ),
        (
            "the gradient of what is added and dropped is not dropped",
            "add_dropped(None, grads[0].to(ctx.dtype), ctx.draw) if needs_change",
            "grads[0].to(ctx.dtype) if needs_change",
            "test_addition_of_what_is_dropped",
        ),
    ),
    *_of(
        "kernels/triton/inputs.py",
        "tests/kernels/test_triton_inputs.py",
        (
            "GELU is made again without the bias of the layer before",
            "            if bias_ptr is not None:\n                exact += tl",
            "            if bias_ptr is not None:\n                exact += 0.0 * tl",
            "test_an_input_is_made_again_and_not_kept",
        ),
        (
            "SwiGLU is made again without its gate's sigmoid",
            "            exact = exact * tl.sigmoid(exact)\n",
            "",
            "test_an_input_is_made_again_and_not_kept",
        ),
        (
            "a norm's output is made again with the mean left in",
            "exact = (exact - mean) * inverse * weight + bias",
            "exact = exact * inverse * weight + bias",
            "test_an_input_is_made_again_and_not_kept",
        ),
        (
            "what the kernels cannot make is taken for what is kept",
            "_KINDS.get(again, (0, ()))",
            "_KINDS.get(again, (0, (0,)))",
            "test_what_the_kernels_cannot_make_is_kept",
        ),
        (
            "SwiGLU's derivative leaves out a term",
            "sigmoid * (1.0 + gate * (1.0 - sigmoid))",
            "sigmoid * (1.0 + gate)",
            "tests/kernels/test_triton.py::test_activations",
        ),
        (
            "GELU's slope has a third of its cubic term",
            "3.0 * 0.07135481627260025",
            "0.07135481627260025",
            "tests/kernels/test_triton.py::test_activations",
        ),
    ),
    *_of(
        "kernels/triton/elementwise.py",
        "tests/kernels/test_triton.py",
        (
            "rotary in Triton reads the rows of a slice as if they were its own",
            "        x.stride(0),\n",
            "        heads * d,\n",
            "test_rotary_takes_slices_of_wider_rows",
        ),
    ),
    *_of(
        "kernels/triton/loss.py",
        "tests/kernels/test_triton.py",
        (
            "the sum is not brought to the new maximum",
            "total = total * tl.exp(before - largest) + tl.sum",
            "total = total + tl.sum",
            "test_the_maximum_is_carried_from_block_to_block",
        ),
        (
            "rows behind the targets keep their logits as gradients",
            "            tl.store(base + column, zeros, mask=column < vocabulary)\n",
            "            pass\n",
            "test_the_loss_of_a_chunk",
        ),
        (
            "a kernel knows of no weights",
            "factor *= tl.load(weights_ptr + row)",
            "factor *= 1.0",
            "test_the_loss_of_a_chunk",
        ),
    ),
    *_of(
        "kernels/triton/adapters.py",
        "tests/kernels/test_triton_linears.py",
        (
            "all adapters draw the mask of the first",
            "return tl.where(j == 0, first, tl.where(j == 1, second, third))",
            "return tl.where(j == 0, first, tl.where(j == 1, first, third))",
            "test_linears",
        ),
        (
            "rows at the seam of two programs count twice",
            "there = row < stop\n        x = input_tile(",
            "there = row < rows\n        x = input_tile(",
            "test_rows_that_several_programs_share",
        ),
        (
            "the input's gradient passes where the adapter dropped it",
            "product = tl.where(_kept(row_keys, column, key, limit), product, 0.0)",
            "product = product + 0.0 * limit",
            "test_linears",
        ),
        (
            "the first columns of k count as the last of q",
            "second = block >= _blocks_before(1,",
            "second = block > _blocks_before(1,",
            "test_the_backward_pass_through_b",
        ),
        (
            "all adapters are scaled as the first",
            "scale = _select(j, scale_0, scale_1, scale_2)",
            "scale = _select(j, scale_0, scale_0, scale_0)",
            "test_the_backward_pass_through_b",
        ),
        (
            "the second range of rows adds nothing to dB",
            "tl.where(of_b, parts, stop)",
            "tl.where(of_b, 1, stop)",
            "test_the_backward_pass_through_b",
        ),
        (
            "the second block of columns adds nothing to ds",
            "tl.where(of_b, parts, stop)",
            "tl.where(of_b, parts, first + 1)",
            "test_the_backward_pass_through_b",
        ),
        (
            "A's gradient at a large rank has half the warps that its sums need",
            '        tiles["num_warps"] *= 2\n',
            "        pass\n",
            "tests/kernels/test_compiled.py::test_every_kernel_is_within_the_limits_of_a_card[sm_89]",
        ),
        (
            "A's gradient at the largest rank has the registers that the assembler gives",
            "    if rank > 64 or kind == LAYER_NORM.value:",
            "    if kind == LAYER_NORM.value:",
            "tests/kernels/test_compiled.py::test_every_kernel_is_within_the_limits_of_a_card[sm_89]",
        ),
        (
            "the product with A is made in fp32, past the tensor cores",
            "total = tl.dot(x, tl.trans(a), total,",
            "total = tl.dot(x.to(tl.float32), tl.trans(a).to(tl.float32), total,",
            "tests/kernels/test_compiled.py::test_kernels_are_within_the_limits_of_a_card",
        ),
        (
            "an even share of the rows compiles A's gradient anew",
            '@kernel(*_DRAWN, "rows", "rows_each")',
            '@kernel(*_DRAWN, "rows")',
            "tests/kernels/test_compiled.py::test_rows_never_compile_a_kernel_anew",
        ),
    ),
    *_of(
        "kernels/triton/activations.py",
        "tests/kernels/test_triton_activations.py",
        (
            "an activation's adapter reads what it dropped",
            "mask = kept(row_keys[:, None], keys[None, :], limit)",
            "mask = mask & (row_keys[:, None] == row_keys[:, None])",
            "test_an_activation_inside_the_layer_that_reads_it",
        ),
        (
            "the gradient of an activation passes where the adapter dropped it",
            "d_out = tl.where(mask, d_out, 0.0)",
            "d_out = tl.where(both, d_out, 0.0)",
            "test_an_activation_inside_the_layer_that_reads_it",
        ),
        (
            "A's gradient has the part of an activation that was dropped",
            "tl.where(mask, z.to(kind), 0.0)",
            "tl.where(both, z.to(kind), 0.0)",
            "test_an_activation_inside_the_layer_that_reads_it",
        ),
        (
            "an activation is differentiated without the bias before it",
            "x += bias[:, None]",
            "x += 0.0 * bias[:, None]",
            "test_an_activation_inside_the_layer_that_reads_it",
        ),
        (
            "rows at the seam of two programs count twice in an activation's A",
            "stop = tl.minimum(first + rows_each, rows)",
            "stop = tl.minimum(first + rows_each + 10, rows)",
            "test_rows_that_several_programs_share",
        ),
        (
            "the bias before an activation gets no gradient",
            "if bias is not None and needs_bias:",
            "if bias is not None and not needs_bias:",
            "test_an_activation_inside_the_layer_that_reads_it",
        ),
        (
            "each element of an activation is made in two places",
            'tl.trans(tl.dot(d_low, a, input_precision="ieee"))',
            'tl.dot(tl.trans(a), tl.trans(d_low), input_precision="ieee")',
            "tests/kernels/test_compiled.py::test_an_activation_is_made_once_an_element",
        ),
    ),
    *_of(
        "kernels/triton/linears.py",
        "tests/kernels/test_triton_linears.py",
        (
            "an activation is made beside the layer that could make it",
            "again[0] in ACTIVATIONS",
            "again[0] in ()",
            "tests/kernels/test_triton_activations.py::test_an_activation_inside_the_layer_that_reads_it",
        ),
        (
            "one of two layers makes the activation that both read",
            "and len(operands) == 1 and",
            "and len(operands) >= 1 and",
            "tests/kernels/test_triton_activations.py::test_an_activation_that_others_read_is_made_for_them",
        ),
        (
            "the large product is written over the small one",
            "if dx is None else dx.addmm_(dy, weight)",
            "if dx is None else dx.addmm_(dy, weight, beta=0)",
            "test_linears",
        ),
        (
            "dx gets nothing of q where k and v are narrow",
            "for pair in pairs if pair[1].shape[0] > _NARROW]",
            "for pair in pairs if pair[1].shape[0] < 0]",
            "test_linears",
        ),
        (
            "dB keeps the columns that fill a tile",
            "d_a_j[:rank], d_b_j[:, :rank]",
            "d_a_j[:rank], d_b_j[:, -rank:]",
            "test_linears",
        ),
        (
            "adapters in fp32 are unrolled on a card that has no tensor cores for them",
            "scalar = dtype.itemsize > 2 and",
            "scalar = dtype.itemsize > 4 and",
            "tests/kernels/test_compiled.py::test_adapters_in_fp32_are_left_to_the_plain_form",
        ),
    ),
    *_of(
        "kernels/triton/jit.py",
        "tests/kernels/test_compiled.py",
        (
            "kernels are compiled anew for rows that are multiples of 16",
            "do_not_specialize=list(varying)",
            "do_not_specialize=[]",
            "test_rows_never_compile_a_kernel_anew",
        ),
        (
            "another version of Triton rounds products and sums apart",
            "functools.partial(self._function[grid], enable_fp_fusion=True)",
            "functools.partial(self._function[grid])",
            "test_contraction_is_not_left_to_the_version_of_triton",
        ),
    ),
    *_of(
        "kernels/triton/updates.py",
        "tests/kernels/test_triton_updates.py",
        (
            "Triton's AdamW leaves out the factor on the gradient",
            "other=0.0) * gradient_factor\n    first = ",
            "other=0.0)\n    first = ",
            "test_updates[0.3-big0-adamw]",
        ),
        (
            "Triton's Adafactor forgets its epsilon",
            "before + (total / columns + epsilon - before) * beta2_left",
            "before + (total / columns - before) * beta2_left",
            "test_updates[0.3-big0-adafactor]",
        ),
        (
            "Triton's Adafactor averages a shard's columns over its own rows",
            "sums = yield sums.sum(1)\n    column.lerp_(sums.div_(whole)",
            "sums = yield sums.sum(1)\n    column.lerp_(sums.div_(rows)",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
        (
            "Triton's Adafactor divides a shard's outer product by the mean of its own rows",
            "((yield row.sum(dim=-1, keepdim=True)) / whole)",
            "((yield row.sum(dim=-1, keepdim=True)) / rows)",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
        (
            "Triton's Adafactor clips a shard's update by its own norm",
            "mean_square = (yield squared.sum(1)).div_(whole * columns)",
            "yield squared.sum(1)\n    mean_square = squared.sum(1).div_(rows * columns)",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
    ),
    # --- lora ------------------------------------------------------------------------------------
    *_of(
        "lora/injection.py",
        "tests/lora/test_injection.py",
        (
            "A is drawn twice as wide",
            "bound = 1.0 / math.sqrt(factor.shape[1])",
            "bound = 2.0 / math.sqrt(factor.shape[1])",
            "test_a_starts_uniform_within_one_over_root_k_and_b_at_zero",
        ),
        (
            "every A is the same draw",
            'f"{seed}/{name}.lora_A"',
            'f"{seed}/lora_A"',
            "test_each_a_is_a_function_of_seed_and_name_alone",
        ),
        (
            "the seed plays no part in A",
            'f"{seed}/{name}.lora_A"',
            'f"{name}.lora_A"',
            "test_each_a_is_a_function_of_seed_and_name_alone",
        ),
        (
            "the base model is trained too",
            "    if freeze:\n        model.requires_grad_(False)\n",
            "",
            "test_what_is_trained_is_what_peft_trains",
        ),
        (
            "all-linear adapts the head",
            "names = [name for name in linears if not _is_head(model, name, linears[name])]",
            "names = list(linears)",
            "test_all_linear_leaves_the_head_out",
        ),
        (
            "a target that matches nothing is passed over",
            "        if unmatched:\n",
            "        if len(unmatched) == len(targets):\n",
            "test_a_target_that_cannot_be_adapted_is_named",
        ),
        (
            "a name matches the end of a word",
            'name == target or name.endswith(f".{target}")',
            "name.endswith(target)",
            "test_a_list_matches_whole_parts_of_a_name_and_a_string_the_whole_name",
        ),
        (
            "trained biases stay in the base's half precision",
            "parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))",
            "parameter.data.to(parameter.dtype)",
            "test_factors_are_fp32_over_any_narrower_base",
        ),
        (
            "a second adapter goes over the first",
            "    if any(isinstance(module, LoraLinear) for module in model.modules()):\n",
            "    if False:\n",
            "test_a_second_adapter_is_refused",
        ),
        (
            "adapters count as part of the base",
            "base=total - _elements(adapters)",
            "base=total",
            "test_seed_001_counts_on_the_meta_device",
        ),
    ),
    *_of(
        "lora/config.py",
        "tests/lora/test_injection.py",
        (
            "rslora's scale is that without it",
            "alpha / math.sqrt(r) if self.use_rslora",
            "alpha / r if self.use_rslora",
            "test_scale",
        ),
    ),
    *_of(
        "lora/tensors.py",
        "tests/lora/test_adapter.py",
        (
            "a tensor that is missing keeps its starting value",
            "    if missing := own.keys() - tensors.keys():\n",
            "    if False and (missing := own.keys() - tensors.keys()):\n",
            "test_every_tensor_that_does_not_fit_is_listed_at_once",
        ),
        (
            "a PiSSA file holds what is trained, not the difference from the start",
            "a, b = from_start(layer)",
            "pass",
            "tests/lora/test_pissa.py::test_a_trained_adapter_is_for_the_unchanged_base",
        ),
    ),
    *_of(
        "lora/saved_modules.py",
        "tests/lora/test_saved_modules.py",
        (
            "a trained embedding stays in half precision",
            "weight.data.to(torch.promote_types(weight.dtype, torch.float32))",
            "weight.data",
            "test_masters_are_fp32_and_the_stream_is_not",
        ),
        (
            "a tied head has no name in the file",
            "if isinstance(head, nn.Parameter) and HEAD not in found:",
            "if False:",
            "test_ours_loads_in_peft_and_here[tied]",
        ),
    ),
    *_of(
        "lora/token_rows.py",
        "tests/lora/test_token_rows.py",
        (
            "every row learns",
            "torch.where((place >= 0).unsqueeze(-1), trained.to(x.dtype), x)",
            "x + trained.to(x.dtype) - x",
            "test_ours_loads_in_peft_and_here[llama]",
        ),
    ),
    *_of(
        "lora/pissa.py",
        "tests/lora/test_pissa.py",
        (
            "the plan does not see that a weight has fewer directions than ranks",
            "        if r > most:\n",
            "        if r > most and not layer.weight.is_meta:\n",
            "test_more_ranks_than_directions_are_refused",
        ),
        (
            "PiSSA leaves the weights whole",
            "alpha=-layer.scale",
            "alpha=0",
            "test_the_start_is_peft_s",
        ),
        (
            "a PiSSA file doubles its scale",
            "lora_alpha=config.lora_alpha * factor,",
            "lora_alpha=config.lora_alpha,",
            "test_a_trained_adapter_is_for_the_unchanged_base",
        ),
    ),
    *_of(
        "lora/linear.py",
        "tests/lora/test_injection.py",
        (
            "the factors are in the base's half precision",
            "dtype = torch.promote_types(linear.weight.dtype, torch.float32)",
            "dtype = linear.weight.dtype",
            "test_factors_are_fp32_over_any_narrower_base",
        ),
        (
            "all adapters draw the same masks",
            "self.module = module_id(name)",
            'self.module = module_id("")',
            "test_dropout_draws_are_keyed_by_the_module",
        ),
        (
            "the adapter's product is not scaled in a network that is not ours",
            "self.lora_B) * self.scale",
            "self.lora_B)",
            "test_forward_in_a_network_that_is_not_ours",
        ),
        (
            "evaluation drops too",
            "self.dropout, self.training)",
            "self.dropout, True)",
            "test_forward_drops_in_training_mode_alone",
        ),
    ),
    *_of(
        "lora/merging.py",
        "tests/lora/test_merging.py",
        (
            "the merged sum is made in the weight's half precision",
            "    merged = torch.addmm(weight, layer.lora_B, layer.lora_A, alpha=layer.scale)",
            "    update = layer.scale * (layer.lora_B @ layer.lora_A)\n"
            "    merged = layer.weight + update.to(layer.weight.dtype)",
            "test_the_sum_is_made_in_fp32_and_rounded_once",
        ),
        (
            "a merged DoRA weight keeps the lengths of the sum",
            "merged *= ratio.unsqueeze(1)",
            "pass",
            "tests/lora/test_lora_dora.py::test_merged_it_is_peft_s_merged",
        ),
        (
            "the merged sum leaves out the scale",
            "layer.lora_A, alpha=layer.scale)",
            "layer.lora_A)",
            "test_the_merged_model_computes_what_the_adapted_one_did",
        ),
        (
            "infinite weights are merged",
            "        if not merged.isfinite().all():\n",
            "        if merged.isnan().any():\n",
            "test_a_merged_weight_that_is_not_finite_is_refused",
        ),
        (
            "a tied weight is merged into, and changes two modules",
            "        if others:\n",
            "        if False:\n",
            "test_a_tied_weight_is_refused",
        ),
        (
            "trained biases stay fp32 in a half-precision model",
            "            bias.data = bias.data.to(weight.dtype)\n",
            "            pass\n",
            "test_the_sum_is_made_in_fp32_and_rounded_once",
        ),
    ),
    *_of(
        "lora/adapter.py",
        "tests/lora/test_adapter.py",
        (
            "the plan does not compare a starting adapter's tensors",
            "                fitted(model, tensors)\n",
            "",
            "tests/train/test_init_from.py"
            "::test_tensors_that_do_not_fit_the_base_are_refused_by_the_plan_too",
        ),
        (
            "a loaded adapter is trained though nobody asked",
            "    if not trainable:\n",
            "    if trainable:\n",
            "test_an_adapter_of_peft_loads_here_and_gives_its_logits",
        ),
        (
            "PEFT's DoRA is taken for plain LoRA",
            "if key not in known and _is_given(document, key)]",
            'if key not in {*known, "use_dora"} and _is_given(document, key)]',
            "test_what_is_not_supported_is_named",
        ),
    ),
    # --- models ----------------------------------------------------------------------------------
    *_of(
        "models/layers.py",
        "tests/models/test_layers.py",
        (
            "attention is scaled by the head's size, not its root",
            "cache.length, self.head_dim**-0.5\n",
            "cache.length, self.head_dim**-1.0\n",
            "tests/models/test_parity.py::test_logits_for_each_family_rope_and_attention",
        ),
        (
            "the second norm sees the stream without attention's change",
            "        x, normed = stream.normed(self.post_attention_layernorm)\n",
            "        x, normed = stream.normed(self.post_attention_layernorm)\n"
            "        normed = self.post_attention_layernorm(x - change)\n",
            "tests/models/test_parity.py::test_logits_for_each_family_rope_and_attention",
        ),
        (
            "the final norm is left out",
            "        return stream.normed(self.model.norm)[1].value\n",
            "        return self.operations.add(*stream)\n",
            "tests/models/test_parity.py::test_logits_for_each_family_rope_and_attention",
        ),
        (
            "gate and up are exchanged",
            "gate, up = run.linears(x, pair, segments)",
            "up, gate = run.linears(x, pair, segments)",
            "tests/models/test_parity.py::test_logits_for_each_family_rope_and_attention",
        ),
        (
            "positions behind a cache begin at 0 in the rotary tables",
            "        offset = 0 if cache is None else cache.length\n",
            "        offset = 0\n",
            "tests/models/test_parity.py::test_decoding_with_a_cache",
        ),
        (
            "the sums of StarCoder2's MLP are not dropped",
            "_changed(x, change, self.mlp_residual, segments)",
            "_changed(x, change, None, segments)",
            "test_dropouts_stand_where_the_architecture_has_them",
        ),
        (
            "a layer that is computed again hands on the stream without its last change",
            "return add(*self._run(Stream(x.value), tables, segments))",
            "return self._run(Stream(x.value), tables, segments).x",
            "test_gradient_checkpointing_changes_no_bit",
        ),
        (
            "attention's dropout shares its masks among layers",
            'name = f"model.layers.{layer}.self_attn.attention_dropout"',
            'name = "model.layers.self_attn.attention_dropout"',
            "test_set_dropout_reaches_every_place_that_the_architecture_has",
        ),
        (
            "adapters lose their dropout with the architecture's",
            "        if isinstance(module, Dropout):\n            module.p = p\n",
            "        if isinstance(module, Dropout):\n            module.p = p\n"
            '        elif hasattr(module, "lora_A"):\n            module.dropout = p\n',
            "test_set_dropout_leaves_adapters_their_own",
        ),
        (
            "an untied model reads its embedding as its head",
            "if not self.config.tie_word_embeddings:",
            "if False:",
            "tests/models/test_parity.py::test_variants",
        ),
        (
            "a tied head does not see the rows that are trained",
            "return embedding.weight if isinstance(embedding, nn.Embedding) else embedding.table()",
            "return embedding.weight",
            "tests/lora/test_token_rows.py::test_ours_loads_in_peft_and_here[qwen2]",
        ),
    ),
    *_of(
        "models/rotary.py",
        "tests/models/test_rotary.py",
        (
            "linear scaling multiplies instead of dividing",
            "return plain / rope.factor, 1.0",
            "return plain * rope.factor, 1.0",
            "test_frequencies_and_size",
        ),
        (
            "dynamic scaling begins one factor too late",
            "- (rope.factor - 1)\n",
            "- rope.factor\n",
            "test_frequencies_and_size",
        ),
        (
            "llama3 stretches the frequencies that it should keep",
            "    return _blend(plain, rope.factor, keep.clamp(0, 1))\n",
            "    return _blend(plain, rope.factor, 1 - keep.clamp(0, 1))\n",
            "test_frequencies_and_size",
        ),
        (
            "yarn's ramp is not truncated to whole dimensions",
            "    if rope.truncate:\n",
            "    if not rope.truncate:\n",
            "test_frequencies_and_size",
        ),
        (
            "yarn does not sharpen attention",
            "return 1.0 if rope.factor <= 1 else 0.1 * mscale",
            "return 1.0 if rope.factor >= 1 else 0.1 * mscale",
            "test_frequencies_and_size",
        ),
        (
            "angles are made in half precision",
            "angles = segments.positions[:, None].float() * frequencies",
            "angles = (segments.positions[:, None].float() * frequencies).to(dtype)",
            "tests/models/test_layers.py::test_rotary_tables_stay_fp32_under_autocast_and_take_the_type_asked_for",
        ),
        (
            "a document's pads make its dynamic scaling longer",
            "lengths = [max(limit, offset + length) for length in segments.lengths]",
            "lengths = [max(limit, offset + length) for length in segments.rows]",
            "tests/models/test_layers.py::test_dynamic_rope_follows_each_document_s_own_real_length",
        ),
    ),
    *_of(
        "models/starcoder2.py",
        "tests/models/test_layers.py",
        (
            "the embedding is not dropped",
            "return self.operations.add(None, embedded, draw)",
            "return embedded",
            "test_the_three_dropouts_act_exactly_where_there_is_a_draw",
        ),
        (
            "both residual dropouts draw the same masks",
            'Dropout(f"{name}.mlp.residual_dropout", p)',
            'Dropout(f"{name}.self_attn.residual_dropout", p)',
            "test_set_dropout_reaches_every_place_that_the_architecture_has",
        ),
        (
            "the plan forgets the masks of StarCoder2's residual dropouts",
            "    residual_dropouts=2,\n",
            "    residual_dropouts=0,\n",
            "tests/models/test_families.py::test_the_plan_counts_the_masks_of_residual_dropouts",
        ),
    ),
    *_of(
        "models/qwen2.py",
        "tests/models/test_parity.py",
        (
            "q, k and v of Qwen2 have no biases",
            "qkv_bias=True",
            "qkv_bias=False",
            "test_logits_for_each_family_rope_and_attention",
        ),
    ),
    *_of(
        "models/mistral.py",
        "tests/models/test_config.py",
        (
            "no layer of a Mistral sees its window",
            'read.number("rms_norm_eps", 0.0, 1.0), **fields}',
            'read.number("rms_norm_eps", 0.0, 1.0), '
            '**fields, "layer_types": ("full_attention",) * layers}',
            "tests/models/test_parity.py::test_window_shorter_than_the_sequence",
        ),
        (
            "a Mistral that names no window has none",
            '"sliding_window": 4096',
            '"sliding_window": None',
            "test_mistral_slides_in_every_layer_unless_its_window_is_null",
        ),
        (
            "a Mistral's null window is the default one",
            'TOKEN_IDS | {"sliding_window"}',
            "TOKEN_IDS",
            "tests/models/test_null_and_zero.py::test_an_absent_or_null_key_is_what_transformers_makes_of_it",
        ),
        (
            "the layers that a Mistral's file asks for are passed over",
            "if asked is not None and asked != list(",
            "if asked == 0 and asked != list(",
            "test_layers_of_a_mistral_that_differ_are_refused",
        ),
        (
            "a Mistral is saved as a Llama",
            '"MistralForCausalLM"',
            '"LlamaForCausalLM"',
            "tests/models/test_families.py::test_the_tests_know_every_family_that_is_listed",
        ),
        (
            "the plan forgets what a Mistral's MLP keeps",
            "2 * config.intermediate_size",
            "config.intermediate_size",
            "tests/train/test_plan.py::test_activations_are_what_autograd_saves",
        ),
    ),
    *_of(
        "models/qwen3.py",
        "tests/models/test_parity.py",
        (
            "keys go through the norm of the queries",
            "(self.k_norm, k)",
            "(self.q_norm, k)",
            "test_logits_for_each_family_rope_and_attention",
        ),
        (
            "the norm of the queries has an epsilon of its own",
            "self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, operations)",
            "self.q_norm = RMSNorm(config.head_dim, 1e-6, operations)",
            "test_variants",
        ),
        (
            "the norms get all heads of a token at once",
            "norm(heads.flatten(0, 1)).value.view_as(heads)",
            "norm(heads).value",
            "tests/models/test_triton_models.py::test_loss_and_gradients_are_those_of_the_reference",
        ),
        (
            "a Qwen3 has no biases though its file says so",
            "bias = config.attention_bias",
            "bias = False",
            "test_variants",
        ),
        (
            "a Qwen3's heads divide its width where the file says nothing",
            '"head_dim": 128',
            '"head_dim": None',
            "tests/models/test_null_and_zero.py::"
            "test_an_absent_or_null_key_is_what_transformers_makes_of_it",
        ),
        (
            "every layer of a Qwen3 sees all",
            "        **window_of_later_layers(read, layers),\n",
            '        "layer_types": ("full_attention",) * layers,\n',
            "test_window_shorter_than_the_sequence",
        ),
        (
            "the plan forgets what the norms of queries and keys keep",
            "config.num_key_value_heads) * config.head_dim",
            "config.num_key_value_heads)",
            "tests/train/test_plan.py::test_activations_are_what_autograd_saves",
        ),
    ),
    *_of(
        "models/keys.py",
        "tests/models/test_parity.py",
        (
            "every layer of a Qwen2 has the window of its later ones",
            "return self.sliding_window if sliding else None",
            "return self.sliding_window",
            "test_window_shorter_than_the_sequence",
        ),
        (
            "a window of zero is taken where it is used",
            "1 if used else 0",
            "0",
            "tests/models/test_config.py::test_bad_windows_are_named",
        ),
        (
            "a window is on though it is switched off",
            "    if not used:\n        window = None\n",
            "    used = True\n",
            "test_a_window_that_is_switched_off",
        ),
    ),
    *_of(
        "models/weights.py",
        "tests/models/test_weights.py",
        (
            "starting weights do not depend on the seed",
            'f"{seed}/{name}".encode()',
            'f"{name}".encode()',
            "test_starting_weights_depend_on_seed_and_name_alone",
        ),
        (
            "a tied model's own head is passed over though it differs",
            "    if not same:\n",
            "    if False:\n",
            "test_a_stray_head_is_accepted_where_it_is_the_embedding_once_more",
        ),
        (
            "a link may lead out of a model's folder",
            "    if path.resolve().parent not in allowed:\n",
            "    if False:\n",
            "test_links_lead_nowhere_but_to_the_hub_caches_blobs",
        ),
    ),
    # --- data ------------------------------------------------------------------------------------
    *_of(
        "data/turns.py",
        "tests/data/test_spans.py",
        (
            "an answer that comes first is trained with its header",
            "known = [header for header in known if header]",
            "known = []",
            "test_the_header_of_an_answer_that_comes_first_is_not_trained",
        ),
        (
            "a part of a header is no header",
            "                    if (place := written.find(header[:end])) >= 0:",
            "                    if (place := written.find(header[:end])) > 10**9:",
            "test_a_header_that_no_prefix_shows_whole_is_known_by_its_part",
        ),
        (
            "a tool's answer within a turn is trained",
            "                return None  # the tool's answer is in it too\n",
            "                return place\n",
            "test_the_answer_of_a_tool_within_an_assistant_s_turn_is_not_trained",
        ),
        (
            "a fixed tail with an EOS of its own is trained",
            "        if eos in text[said : place[1]]:\n            return place[1]\n",
            "",
            "test_a_fixed_tail_with_ends_of_its_own_is_not_trained",
        ),
        (
            "an answer loses what it shares with the rest of the header",
            "shared = min(shared, begins)",
            "shared = max(shared, begins)",
            "test_an_answer_that_begins_like_the_rest_of_the_header_is_trained_whole",
        ),
    ),
    *_of(
        "data/spans.py",
        "tests/data/test_spans.py",
        (
            "what others say is a turn's trace",
            "return whole.text.count(sign) > known",
            "return True",
            "test_what_others_say_alike_is_no_trace",
        ),
        (
            "the description of a tool is a call's trace",
            ".count(sign) if chat.tools else 0",
            ".count(sign) * 0",
            "test_a_tool_that_is_described_has_not_been_called",
        ),
        (
            "arguments are written as Python writes them",
            "    if any(_is_python(call, whole.text) for call in",
            "    if any(False for call in",
            "tests/data/test_messages.py::test_a_call_is_written_once_and_as_json_whatever_form_"
            "a_template_wants",
        ),
        (
            "calls have one form alone",
            "    return [_in_the_form_that_fits(chat, tokenizer) for chat in chats]",
            "    return [_render([chat], tokenizer)[0] for chat in chats]",
            "tests/data/test_messages.py::test_a_call_is_written_once_and_as_json_whatever_form_"
            "a_template_wants",
        ),
        (
            "thinking that is left out is not counted",
            'return not all(says(text, {"content": thought}) for thought in thoughts)',
            "return False",
            "test_thinking_that_a_template_leaves_out_is_counted",
        ),
        (
            "a message with loss: false is trained",
            '_SAYS = re.compile(r"weight|loss|train',
            '_SAYS = re.compile(r"weight|train',
            "test_a_message_is_kept_out_of_the_loss",
        ),
    ),
    *_of(
        "data/batch.py",
        "tests/data/test_batch.py",
        (
            "labels are not shifted: each token is its own target",
            "targets[start : start + length - 1] = document.labels[1:]",
            "targets[start : start + length] = document.labels",
            "test_targets_are_the_next_token_of_the_same_document",
        ),
        (
            "the last token of a document predicts the first of the next",
            "    return MicroBatch(\n        input_ids=torch.from_numpy(input_ids),\n",
            "    targets[starts[1:-1] - 1] = input_ids[starts[1:-1]]\n"
            "    return MicroBatch(\n        input_ids=torch.from_numpy(input_ids),\n",
            "test_targets_are_the_next_token_of_the_same_document",
        ),
        (
            "pads are targets",
            "targets = np.full(starts[-1], IGNORED, dtype=np.int64)",
            "targets = np.full(starts[-1], pad_id, dtype=np.int64)",
            "test_padding_is_the_pad_token_without_targets",
        ),
        (
            "padding is counted among the tokens",
            "num_tokens=sum(lengths)",
            "num_tokens=int(starts[-1])",
            "test_all_cuts_hold_the_same_examples_in_the_same_order",
        ),
        (
            "a micro-batch exceeds its budget by an example",
            "rows[batching.layout] > budget and stop > start",
            "rows[batching.layout] > budget + longest and stop > start",
            "test_cut_by_tokens_takes_as_many_as_fit",
        ),
        (
            "a budget counts padded rows as their tokens",
            '"longest": count * longest,',
            '"longest": tokens,',
            "test_cut_by_tokens_takes_as_many_as_fit",
        ),
        (
            "the last micro-batch of a step is lost",
            "    if len(lengths):\n        yield slice(start, len(lengths))\n",
            "",
            "test_all_cuts_hold_the_same_examples_in_the_same_order",
        ),
    ),
    *_of(
        "data/mixture.py",
        "tests/data/test_mixture.py",
        (
            "mixtures of other shares have one hash",
            " + repr(self.places).encode())",
            ")",
            "test_the_hash_tells_where_a_source_ends_and_what_its_share_is",
        ),
        (
            "every epoch begins its sources anew",
            "self._draws(source, epoch * count, count,",
            "self._draws(source, 0, count,",
            "test_all_of_a_source_comes_once_before_any_of_it_comes_twice",
        ),
        (
            "a source is permuted once, and then alike each time",
            "counter = np.array([0, 0, source, number], dtype=np.uint64)",
            "counter = np.array([0, 0, source, 0], dtype=np.uint64)",
            "test_all_of_a_source_comes_once_before_any_of_it_comes_twice",
        ),
        (
            "sources of one size are permuted alike",
            "counter = np.array([0, 0, source, number], dtype=np.uint64)",
            "counter = np.array([0, 0, 0, number], dtype=np.uint64)",
            "test_sources_of_one_size_are_permuted_each_in_its_own_way",
        ),
        (
            "an epoch begins where a round of the source does",
            "begin = start - first * len(own)",
            "begin = 0",
            "test_all_of_a_source_comes_once_before_any_of_it_comes_twice",
        ),
        (
            "places go to the smallest remainders",
            "key=lambda j: places[j] - quotas[j])",
            "key=lambda j: quotas[j] - places[j])",
            "test_places_are_shared_out_by_largest_remainders",
        ),
        (
            "a source begins with the last row of the one before it",
            'examples.rows, side="right")',
            'examples.rows, side="left")',
            "test_a_source_is_its_rows_whichever_of_them_are_left",
        ),
        (
            "without shuffling sources come one after another",
            "places = [(2 * np.arange(count) + 1) / (2 * count) for",
            "places = [np.zeros(count) for",
            "test_without_shuffling_sources_keep_their_order_and_are_spread_evenly",
        ),
        (
            "the hash does not tell where sources end",
            """digest.update(b"source" + own.astype""",
            """digest.update(own.astype""",
            "test_the_hash_tells_where_a_source_ends_and_what_its_share_is",
        ),
    ),
    *_of(
        "data/order.py",
        "tests/data/test_mixture.py",
        (
            "what a mixture draws is not shuffled",
            "epoch=epoch, shuffle=shuffle)[order]",
            "epoch=epoch, shuffle=shuffle)",
            "test_the_places_are_shuffled_as_without_a_mixture",
        ),
    ),
    *_of(
        "data/examples.py",
        "tests/train/test_mixtures.py",
        (
            "the same files as other sources are taken from the cache",
            'content |= {"sources": [len(part.files) for part in parts]}',
            'content |= {"sources": len(parts)}',
            "test_where_a_source_ends_is_kept_with_the_rows",
        ),
    ),
    *_of(
        "train/inputs/dataset.py",
        "tests/train/test_mixtures.py",
        (
            "a resume does not see that rows changed their source",
            'hashes["train"] = self.mixture.fingerprint(self.train.fingerprint)',
            'hashes["train"] = self.train.fingerprint',
            "test_a_resumed_run_keeps_its_sources",
        ),
    ),
    *_of(
        "train/batches.py",
        "tests/train/test_mixtures.py",
        (
            "weights change nothing",
            "            mixture=data.mixture,\n",
            "",
            "test_a_run_trains_the_shares_and_its_plan_says_them",
        ),
    ),
    *_of(
        "train/plan/mixture.py",
        "tests/train/test_mixtures.py",
        (
            "a source's targets count as if each of its examples came once",
            "source.places * source.targets / source.examples for source",
            "source.targets for source",
            "test_a_run_trains_the_shares_and_its_plan_says_them",
        ),
        (
            "a run's rows are seen as often as an epoch's",
            "epochs * source.places / source.examples",
            "source.places / source.examples",
            "test_times_seen_are_of_the_whole_run",
        ),
    ),
    *_of(
        "train/plan/cuts.py",
        "tests/train/test_mixtures.py",
        (
            "steps of tokens are cut as if all examples came once",
            "            mixture=rows.mixture,\n",
            "",
            "test_steps_of_tokens_are_cut_in_the_mixture_s_order",
        ),
    ),
    *_of(
        "data/order.py",
        "tests/data/test_order.py",
        (
            "every epoch has the order of the first",
            "manual_seed(seed + epoch)",
            "manual_seed(seed)",
            "test_shuffle_is_randperm_of_seed_plus_epoch",
        ),
        (
            "groups go from short to long",
            'np.argsort(-lengths[chunk], kind="stable")',
            'np.argsort(lengths[chunk], kind="stable")',
            "test_length_groups_equal_transformers",
        ),
        (
            "equal lengths are not kept in their order",
            'np.argsort(-lengths[chunk], kind="stable")',
            'np.argsort(lengths[chunk], kind="stable")[::-1]',
            "test_length_groups_equal_transformers",
        ),
        (
            "the longest example is not the first of all",
            "    grouped[[0, longest]] = grouped[[longest, 0]]\n",
            "",
            "test_length_groups_equal_transformers",
        ),
        (
            "the global generator is drawn from",
            "order = torch.randperm(num_examples, generator=generator).numpy()",
            "torch.manual_seed(seed + epoch)\n        order = torch.randperm(num_examples).numpy()",
            "test_no_global_generator_is_touched",
        ),
    ),
    *_of(
        "data/arrays.py",
        "tests/data/test_examples.py",
        (
            "a cached array is believed without its hash",
            '        if _digest(arrays) != meta["fingerprint"] or meta',
            "        if meta",
            "test_a_damaged_cache_is_made_anew",
        ),
    ),
    # What a row weighs.
    *_of(
        "data/weights.py",
        "tests/data/test_row_weights.py",
        (
            "true is a weight of 1",
            "if isinstance(value, bool) or not isinstance(",
            "if not isinstance(",
            "test_what_is_no_weight_is_refused_with_its_place",
        ),
        (
            "text is a weight in every file",
            "_is_csv(row.where) and _NUMBER",
            "_NUMBER",
            "test_what_is_no_weight_is_refused_with_its_place",
        ),
        (
            "what is no number is neither too small nor too large",
            "not 0 <= value <= _MOST:",
            "value < 0 or value > _MOST:",
            "test_numbers_that_json_does_not_have_are_refused",
        ),
    ),
    *_of(
        "data/arrays.py",
        "tests/data/test_row_weights.py",
        (
            "a row of weight 0 is an example",
            "        if row.weight == 0:\n",
            "        if False:\n",
            "test_every_kind_of_file_has_weights",
        ),
    ),
    *_of(
        "data/examples.py",
        "tests/data/test_row_weights.py",
        (
            "an example of a subset weighs what another does",
            "float(self.weights[position])",
            "float(self._arrays.weights[position])",
            "test_every_kind_of_file_has_weights",
        ),
        (
            "rows are taken from the cache with the weights of another column",
            '        content |= {"weight_field": weight_field}\n',
            "        pass\n",
            "test_weights_are_part_of_what_is_kept",
        ),
    ),
    *_of(
        "data/batch.py",
        "tests/data/test_row_weights.py",
        (
            "a target has the weight of another",
            "torch.from_numpy(weights[target_rows]) if",
            "torch.from_numpy(weights[: len(target_rows)]) if",
            "test_a_micro_batch_has_the_weight_of_each_target",
        ),
    ),
    *_of(
        "train/step.py",
        "tests/train/test_weighted_steps.py",
        (
            "a weighted loss is divided by the number of targets alone",
            "part.total_weight) for part in batch",
            "part.num_targets) for part in batch",
            "test_a_step_s_loss_and_gradient_are_those_of_the_formula",
        ),
        (
            "each micro-batch has a mean weight of its own",
            "draw, gradient_scale, mean_weight\n",
            "draw, gradient_scale, micro_batch.total_weight / micro_batch.num_targets\n",
            "test_every_cut_and_every_padding_gives_one_loss_and_one_gradient",
        ),
    ),
    *_of(
        "train/inputs/dataset.py",
        "tests/train/test_weighted_steps.py",
        (
            "rows of an evaluation must have weights",
            'return settings.weight_field if split == "train" else None',
            "return settings.weight_field",
            "tests/data/test_row_weights.py::test_what_is_shown_weighs_what_is_trained",
        ),
    ),
    *_of(
        "data/examples.py",
        "tests/data/test_examples.py",
        (
            "a token beyond the model's vocabulary is trained",
            "    if largest >= vocab_size:\n",
            "    if largest > vocab_size:\n",
            "test_vocabulary_check_names_the_token",
        ),
        (
            "an example of a subset is keyed by its place there",
            "index = int(self._positions[position])",
            "index = position",
            "tests/data/test_batch.py::test_a_subset_keeps_the_index_that_keys_dropout",
        ),
    ),
    *_of(
        "data/row_files.py",
        "tests/train/test_lint_command.py",
        (
            "a fault of one line ends the reading of all that follow",
            "            on_fault(fault)\n        else:\n            yield row\n",
            "            raise\n        else:\n            yield row\n",
            "test_every_fault_of_a_file_is_told_not_the_first_alone",
        ),
    ),
    *_of(
        "data/lint/scan.py",
        "tests/train/test_lint_command.py",
        (
            "a row is not leaked where its twin is",
            "if mine and others and not told[0, row]:",
            "if mine and not others and not told[0, row]:",
            "test_a_planted_bad_set_is_caught_on_every_count",
        ),
        (
            "the held-out rows are those of training alone",
            'sets[trained[np.isin(numbers, held_out(numbers))]] = SETS.index("valid")',
            "held_out(numbers)",
            "test_rows_that_a_fraction_holds_out_are_the_run_s",
        ),
        (
            "only the answer is looked at for secrets",
            "*private_data(labelled.text)",
            "*private_data(labelled.text[:40])",
            "test_no_secret_is_printed_whole",
        ),
        (
            "a row whose EOS is not trained passes",
            "if targets[-1] != self._settings.tokenizer.eos_id:",
            "if targets[-1] == IGNORED:",
            "test_rows_whose_end_is_not_trained",
        ),
    ),
    *_of(
        "data/lint/private.py",
        "tests/data/test_lint.py",
        (
            "a secret is shown whole",
            "max(1, min(4, len(secret) // 4))",
            "len(secret)",
            "test_a_secret_is_found_and_never_shown_whole",
        ),
    ),
    *_of(
        "data/lint/lengths.py",
        "tests/data/test_lint.py",
        (
            "the first token of a row counts as a target",
            "trained[0] = False",
            "trained[0] = trained[0]",
            "test_what_a_length_costs_is_what_cutting_each_row_loses",
        ),
        (
            "the token at the cut is kept",
            "targets_lost=int(self._targets[max_length:].sum())",
            "targets_lost=int(self._targets[max_length + 1 :].sum())",
            "test_what_a_length_costs_is_what_cutting_each_row_loses",
        ),
    ),
    *_of(
        "data/duplicates.py",
        "tests/data/test_lint.py",
        (
            "shingles are half as long",
            "while width < _SHINGLE:",
            "while width < _SHINGLE // 2:",
            "test_signatures_agree_as_often_as_the_jaccard_similarity_says",
        ),
        (
            "a long text is known by its end",
            "np.minimum(least, some.min(axis=1), out=least)",
            "least = some.min(axis=1)",
            "test_long_texts_are_hashed_in_pieces",
        ),
        (
            "rows that share a bucket are alike",
            ".mean(axis=1) >= SIMILAR",
            ".mean(axis=1) >= 0.0",
            "test_duplicates_are_found_and_others_are_not",
        ),
        (
            "one band is asked alone",
            "for band in range(0, _PLACES, _BAND):",
            "for band in range(0, _BAND, _BAND):",
            "test_likeness_is_passed_on",
        ),
    ),
    *_of(
        "data/lint/characters.py",
        "tests/data/test_lint.py",
        (
            "French quotations are mojibake",
            "\\u00e2(?!\\u00a0){_REST}{{2}}|",
            "[\\u00e0-\\u00ef]{_REST}{{2}}|",
            "test_what_people_write_is_not_odd",
        ),
    ),
    *_of(
        "data/tokenizer_file.py",
        "tests/data/test_tokenizer.py",
        (
            "a tokenizer's own truncation cuts rows in silence",
            "    backend.no_truncation()\n",
            "",
            "test_truncation_and_padding_of_the_file_are_switched_off",
        ),
        (
            "a tokenizer's own padding goes into rows",
            "    backend.no_padding()\n",
            "",
            "test_truncation_and_padding_of_the_file_are_switched_off",
        ),
        (
            "what many small parts make of a text together is not seen",
            "growth *= _check_part(item,",
            "_check_part(item,",
            "tests/data/test_tokenizer_file.py::test_a_part_that_is_not_allowed_is_one_sentence",
        ),
        (
            "two tokens may share an id",
            "        if token_id in owner:\n",
            "        if token_id is owner:\n",
            "tests/data/test_tokenizer_file.py::test_what_only_a_trial_shows_is_one_sentence",
        ),
        (
            "added tokens get other ids than the file says",
            "        if vocabulary.get(token) != token_id:\n",
            "        if token not in vocabulary:\n",
            "tests/data/test_tokenizer_file.py::test_what_only_a_trial_shows_is_one_sentence",
        ),
    ),
    *_of(
        "data/cache.py",
        "tests/data/test_examples.py",
        (
            "$LATHE_CACHE plays no part",
            'os.environ.get("LATHE_CACHE")',
            'os.environ.get("LATHE_CACHED")',
            "test_cache_root",
        ),
    ),
    *_of(
        "data/demo/build.py",
        "tests/data/test_demo_data.py",
        (
            "the docstring stays in the solution",
            "    head = lines[first - 1 : docstring.lineno - 1]\n",
            "    head = lines[first - 1 : docstring.end_lineno]\n",
            "test_functions_without_their_docstrings",
        ),
        (
            "rows of one module may be in two splits",
            "share = int.from_bytes(_sha256(self.name)[:8]) % 100",
            "share = len(self.source) % 100",
            "test_corpus_holds_no_module_of_the_test_rows",
            "test_no_module_is_in_two_splits",
        ),
    ),
    # --- train -----------------------------------------------------------------------------------
    *_of(
        "train/plan/schedule.py",
        "tests/train/test_schedule.py",
        (
            "the first update has a rate above 0",
            "return step / max(1, warmup_steps)",
            "return (step + 1) / max(1, warmup_steps)",
            "test_two_warm_up_steps_of_six",
        ),
        (
            "the decay's length is that of the run",
            "decay_steps = max(1, total_steps - warmup_steps)",
            "decay_steps = max(1, total_steps)",
            "test_two_warm_up_steps_of_six",
        ),
        (
            "a cosine rises again past its end",
            "progress = min(1.0, max(0, step - begin) / decay_steps)",
            "progress = max(0, step - begin) / decay_steps",
            "test_two_warm_up_steps_of_six",
        ),
        (
            "wsd falls from the warm-up on",
            'begin = total_steps - decay_steps if name == "wsd" else warmup_steps',
            "begin = warmup_steps",
            "test_warm_up_stable_decay_equals_the_stack",
        ),
        (
            "a line goes below 0",
            "falling = max(0.0, (total_steps - step) / decay_steps)",
            "falling = (total_steps - step) / decay_steps",
            "test_two_warm_up_steps_of_six",
        ),
        (
            "the floor is added to the curve",
            "return falling * (1.0 - min_lr_ratio) + min_lr_ratio",
            "return falling + min_lr_ratio",
            "test_a_floor_under_the_decay",
        ),
        (
            "the warm-up is rounded down",
            "return math.ceil(total_steps * warmup_ratio)",
            "return int(total_steps * warmup_ratio)",
            "test_the_length_of_the_warm_up",
        ),
    ),
    *_of(
        "train/plan/steps.py",
        "tests/train/test_plan.py",
        (
            "the last, smaller step of an epoch is left out",
            "else math.ceil(num_examples / batch)",
            "else max(1, num_examples // batch)",
            "test_steps_per_epoch_round_up",
        ),
        (
            "a step straddles two epochs",
            "return epoch, start, min(start + self.effective_batch_size, self.num_examples)",
            "return epoch, start, start + self.effective_batch_size",
            "test_epochs_of_three_uneven_steps",
        ),
        (
            "the plan's rate is that of the next step",
            "            step - 1,\n            warmup_steps=self.warmup_steps",
            "            step,\n            warmup_steps=self.warmup_steps",
            "tests/train/test_loop.py::test_it_does_what_the_plan_says_in_this_order",
        ),
        (
            "the number of ranks does not count",
            "* train.gradient_accumulation_steps * world_size",
            "* train.gradient_accumulation_steps",
            "test_effective_batch_size_on_any_number_of_ranks",
        ),
        (
            "the remainder of a batch goes to the last rank",
            "share + (rank < rest)",
            "share + (rest if rank == ranks - 1 else 0)",
            "test_rank_shares",
        ),
        (
            "half an epoch is rounded down",
            "else math.ceil(config.train.num_train_epochs * steps_per_epoch)",
            "else int(config.train.num_train_epochs * steps_per_epoch)",
            "test_fractional_epochs_round_up_to_a_step",
        ),
    ),
    *_of(
        "train/plan/cadence.py",
        "tests/train/test_plan.py",
        (
            "the last step does not evaluate unless it falls due",
            "return steps if steps and steps[-1] == total_steps else (*steps, total_steps)",
            "return steps or (total_steps,)",
            "test_evaluations_include_the_last_step",
        ),
        (
            "five evaluations an epoch become six",
            "max(1, steps_per_epoch // times)",
            "max(1, steps_per_epoch // (times + 1))",
            "test_evaluations_include_the_last_step",
        ),
        (
            "the end of an epoch is where the mean one ends",
            "if cut is not None and times is not None:",
            "if False:",
            "tests/train/test_steps_of_tokens.py"
            "::test_epochs_differ_in_their_steps_and_what_is_due_at_their_ends_is",
        ),
    ),
    *_of(
        "train/plan/cuts.py",
        "tests/train/test_steps_of_tokens.py",
        (
            "a step that has its targets exactly takes one more example",
            "+ wanted, lo=stops[-1] + 1)",
            "+ wanted + 1, lo=stops[-1] + 1)",
            "test_a_step_stops_where_its_targets_are_reached",
        ),
        (
            "a step stops before it has its targets",
            "stops.append(min(enough, len(targets)))",
            "stops.append(max(stops[-1] + 1, min(enough - 1, len(targets))))",
            "test_a_step_stops_where_its_targets_are_reached",
        ),
        (
            "each epoch is cut as the first",
            "epoch=len(done),",
            "epoch=0,",
            "test_each_epoch_is_cut_by_its_own_order",
        ),
        (
            "what is not shuffled is cut as if it were",
            "shuffle=config.data.shuffle",
            "shuffle=True",
            "test_each_epoch_is_cut_by_its_own_order",
        ),
        (
            "an epoch's first step goes on where the last one stopped",
            "0 if first else self.stops[step - 2]",
            "self.stops[step - 2] if step > 1 else 0",
            "test_each_epoch_is_cut_by_its_own_order",
        ),
        (
            "half an epoch is rounded down",
            "before + math.ceil(share * (done[-1] - before))",
            "before + int(share * (done[-1] - before))",
            "test_of_an_epoch_that_is_cut_short_its_share_of_the_steps",
        ),
        (
            "an epoch of which a share is done is done whole",
            "share = train.num_train_epochs - (len(done) - 1)",
            "share = 1",
            "test_of_an_epoch_that_is_cut_short_its_share_of_the_steps",
        ),
        (
            "a step behind the last has no place",
            "step = min(step, len(self.stops))",
            "step = step + 0",
            "test_a_run_made_shorter_than_it_is_ends",
        ),
    ),
    *_of(
        "train/plan/ledger.py",
        "tests/train/test_steps_of_tokens.py",
        (
            "memory is planned for a step of mean size",
            "most = config.train.effective_batch_tokens or effective_batch_size(",
            "most = effective_batch_size(",
            "test_the_plan_says_how_large_a_step_is",
        ),
    ),
    *_of(
        "train/saving/resume.py",
        "tests/train/test_steps_of_tokens.py",
        (
            "another step size is taken where no checkpoint holds the old one",
            "if train.effective_batch_tokens != tokens:",
            "if False:",
            "test_an_edited_step_size_is_refused",
        ),
    ),
    *_of(
        "train/step.py",
        "tests/train/test_accumulation.py",
        (
            "the mean of micro-batch means",
            "(loss * (scale / targets)).backward()",
            "(loss * (scale / len(batch) / max(1, micro_batch.num_targets))).backward()",
            "test_loss_and_gradient_are_those_of_the_token_mean_of_the_whole_step",
        ),
        (
            "clipping measures the gradient with its loss scale",
            "norm = optimizer.gradient_norm() / scale",
            "norm = optimizer.gradient_norm()",
            "test_clipping_sees_the_whole_gradient_once_and_after_unscaling",
        ),
        (
            "the update takes the gradient with its loss scale",
            "clip_factor(norm, max_grad_norm) / scale)",
            "clip_factor(norm, max_grad_norm))",
            "test_clipping_sees_the_whole_gradient_once_and_after_unscaling",
        ),
        (
            "an update is made though the loss is not finite",
            "if not (math.isfinite(norm) and math.isfinite(mean)):",
            "if not math.isfinite(norm):",
            "tests/train/test_step_faults.py::test_nothing_changes_where_a_number_is_not_finite",
        ),
        (
            "an attempt that overflowed leaves its gradient to the next",
            "            return losses, norm, scale\n        optimizer.clear_gradients()\n",
            "            return losses, norm, scale\n",
            "test_an_overflow_halves_the_scale_and_redoes_the_step",
        ),
        (
            "a step that was skipped changes the loss scale",
            "            scaler.load(scaler_before)\n",
            "            pass\n",
            "tests/train/test_step_faults.py::test_a_loss_alone_that_is_not_finite_is_no_good_step_of_the_scaler",
        ),
        (
            "gradients of a broken-off step are added to the next",
            "        optimizer.clear_gradients()\n        examples = ",
            "        examples = ",
            "tests/train/test_step_faults.py::test_out_of_memory_leaves_everything_as_it_was",
        ),
        (
            "the head's gradient is made outside the loss scaler",
            "gradient_scale = scale / targets if scaler else 1.0",
            "gradient_scale = 1.0",
            "test_the_head_s_own_gradient_is_under_the_scaler_too",
        ),
        (
            "the next step is cut while the host could wait for nothing",
            "        if meanwhile is not None:\n"
            "            meanwhile()\n        norm = optimizer.gradient_norm() / scale\n",
            "        norm = optimizer.gradient_norm() / scale\n        if meanwhile is not None:\n"
            "            meanwhile()\n",
            "test_a_step_waits_for_the_device_when_its_gradient_is_there_and_for_nothing_else",
        ),
    ),
    *_of(
        "train/assemble.py",
        "tests/train/test_precision.py",
        (
            "cuBLAS adds the parts of a product in bf16",
            "matmul.allow_bf16_reduced_precision_reduction = False",
            "matmul.allow_bf16_reduced_precision_reduction = True",
            "test_a_run_adds_the_parts_of_a_product_in_fp32",
        ),
    ),
    *_of(
        "train/loss.py",
        "tests/train/test_no_waits.py",
        (
            "the device is asked which rows have a target",
            "        rows=uploaded(micro_batch.target_rows, device),\n",
            "",
            "test_a_step_asks_the_device_for_nothing_up_to_its_norm",
        ),
    ),
    *_of(
        "train/loss.py",
        "tests/train/test_accumulation.py",
        (
            "dropout does not know of the step",
            "        draw=draw,\n    )\n",
            "        draw=None if draw is None else (draw[0], 0),\n    )\n",
            "test_draws_belong_to_seed_and_step_and_to_nothing_that_ran_before",
        ),
        (
            "dropout does not know of the example, but of its place in the micro-batch",
            "examples=micro_batch.examples,",
            "examples=range(len(micro_batch.examples)),",
            "test_no_draw_depends_on_the_cut_the_padding_or_recomputation",
        ),
        (
            "losses are added up in fp32",
            "torch.stack(losses).cpu().double().sum().item()",
            "torch.stack(losses).cpu().sum().item()",
            "test_losses_are_added_up_in_fp64",
        ),
    ),
    *_of(
        "train/optim/buffers.py",
        "tests/train/test_optimizers.py",
        (
            "norms are taken in pieces of 2^24",
            "_NORM_PIECE = 1 << 12",
            "_NORM_PIECE = 1 << 24",
            "tests/train/test_flat.py::test_a_norm_adds_up_few_numbers_at_a_time",
        ),
        (
            "the norm of a long parameter is taken at once",
            "            norm_of(gradient, dim=-1, dtype=dtype).view(-1)\n",
            "            norm_of(gradient, dtype=dtype).view(-1)\n",
            "tests/train/test_flat.py::test_a_norm_adds_up_few_numbers_at_a_time",
        ),
        (
            "long parameters are left out of the norm",
            "            for parameter in self.lone.values()\n",
            "            for parameter in list(self.lone.values())[1:]\n",
            "test_clipping_equals_torch_after_the_loss_scale_is_divided_out",
        ),
        (
            "a shard's norm is taken for the whole",
            "square if self.sharing is None else self.sharing.reduce(square)",
            "square",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
        (
            "nothing is clipped",
            "return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0",
            "return 1.0",
            "test_clipping_equals_torch_after_the_loss_scale_is_divided_out",
        ),
        (
            "a short gradient is lengthened to the bound",
            "return min(1.0, max_norm / (norm + 1e-6)) if",
            "return max_norm / (norm + 1e-6) if",
            "test_clipping_equals_torch_after_the_loss_scale_is_divided_out",
        ),
        (
            "a bound of 0 takes the gradient away",
            "if max_norm > 0 else 1.0",
            "if max_norm >= 0 else 1.0",
            "test_clipping_equals_torch_after_the_loss_scale_is_divided_out",
        ),
        (
            "biases are decayed",
            're.compile(r"bias|layernorm',
            're.compile(r"layernorm',
            "test_which_names_decay",
        ),
        (
            "parameters in the buffer are not aligned",
            "stride = math.ceil(shape.numel() / _ALIGNMENT) * _ALIGNMENT",
            "stride = shape.numel()",
            "tests/train/test_flat.py::test_parameters_of_any_size_begin_where_matrix_products_want_them",
        ),
        (
            "a state of which tensors are missing is taken up",
            'faults = [f"{name} is missing" for name in own if name not in tensors]',
            "faults: list[str] = []",
            "test_a_state_that_does_not_fit_is_refused_whole",
        ),
        (
            "the number of steps is not taken up",
            '        self.steps = int(tensors["steps"].item())\n',
            "",
            "test_a_resumed_optimizer_continues_bit_for_bit",
        ),
        (
            "half-precision masters are taken",
            "        _check_masters(self.parameters, self.master_dtypes)\n",
            "",
            "test_half_precision_parameters_are_refused",
        ),
        (
            "a parameter that no gradient reached is stepped over",
            "        if absent:\n",
            "        if len(absent) == len(self.parameters):\n",
            "test_a_parameter_without_a_gradient_stops_the_step_before_it_begins",
        ),
    ),
    *_of(
        "train/optim/adamw.py",
        "tests/train/test_optimizers.py",
        (
            "decay comes after the update",
            "    if weight_decay:\n        parameter.mul_(1.0 - learning_rate * weight_decay)\n"
            "    parameter.addcdiv_(first, root, value=-learning_rate * correction /"
            " (1.0 - beta1**step))\n",
            "    parameter.addcdiv_(first, root, value=-learning_rate * correction /"
            " (1.0 - beta1**step))\n"
            "    if weight_decay:\n        parameter.mul_(1.0 - learning_rate * weight_decay)\n",
            "test_adamw_by_hand",
        ),
        (
            "epsilon is not corrected with the root",
            ".add_(eps * correction)",
            ".add_(eps)",
            "test_adamw_by_hand",
        ),
        (
            "the first moment is not corrected",
            "value=-learning_rate * correction / (1.0 - beta1**step)",
            "value=-learning_rate * correction",
            "test_adamw_by_hand",
        ),
        (
            "the two betas are exchanged",
            "beta1, beta2 = betas",
            "beta2, beta1 = betas",
            "test_adamw_by_hand",
        ),
        (
            "what does not decay decays",
            "yield Span(some, self.weight_decay if first.decayed else 0.0, rate=first.rate)",
            "yield Span(some, self.weight_decay, rate=first.rate)",
            "test_weight_decay_alone_shrinks_what_is_decayed_and_nothing_else",
        ),
        (
            "LoRA+ has one rate for A and B",
            "learning_rate=learning_rate * span.rate,",
            "learning_rate=learning_rate,",
            "test_loraplus_has_the_rates_of_peft[adamw-1]",
        ),
        (
            "long parameters all decay",
            "self.weight_decay if name in self.decayed else 0.0",
            "self.weight_decay",
            "test_adamw_equals_torch[torch.float64-0.1-1048576-0]",
        ),
    ),
    *_of(
        "train/optim/__init__.py",
        "tests/train/test_optimizers.py",
        (
            "a layer norm decays where its name does not say what it is",
            "decays(name) and name not in layer_norms",
            "decays(name)",
            "test_a_layer_norm_is_not_decayed_whatever_its_name",
        ),
    ),
    *_of(
        "train/optim/adafactor.py",
        "tests/train/test_optimizers.py",
        (
            "a shard's update is clipped by its own norm",
            "rate = clipped_rate((yield norm.square()), elements, learning_rate)\n    rate = rate",
            "yield norm\n    rate = clipped_rate(norm.square(), elements, learning_rate)\n"
            "    rate = rate",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
        (
            "a shard's columns are averaged over its own rows",
            "column.lerp_(sums.div_(whole)",
            "column.lerp_(sums.div_(rows)",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
        (
            "a shard's outer product is divided by the mean of its own rows",
            "(total / whole)).rsqrt_().unsqueeze(-1)",
            "row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)",
            "tests/train/test_flat.py::test_shards_of_the_rows_are_updated_as_the_whole",
        ),
        (
            "updates are not clipped to a root mean square of 1",
            "(squared_norm.sqrt() / math.sqrt(elements)).clamp_(min=1.0)",
            "(squared_norm.sqrt() / math.sqrt(elements)).clamp_(min=1.0, max=1.0)",
            "test_adafactor_clips_an_update_whose_root_mean_square_exceeds_1",
        ),
        (
            "the second moment remembers from the first step on",
            "beta2 = 1.0 - self.steps**DECAY_RATE",
            "beta2 = 1.0 - (self.steps + 1) ** DECAY_RATE",
            "test_adafactor_by_hand",
        ),
        (
            "row means are sums",
            "row[..., block].lerp_(squared.mean(dim=-1)",
            "row[..., block].lerp_(squared.sum(dim=-1)",
            "test_adafactor_equals_the_stack[torch.float64-0.1-1048576-1048576]",
        ),
        (
            "the outer product is not divided by the rows' mean",
            "(row / (total / whole)).rsqrt_()",
            "row.rsqrt()",
            "test_adafactor_by_hand",
        ),
        (
            "a matrix in blocks is clipped by its last block",
            "norm = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1)",
            "norm = torch.linalg.vector_norm(norms[-1], dim=1)",
            "test_adafactor_equals_the_stack",
        ),
        (
            "decay comes after the update of a matrix",
            "        if weight_decay:\n"
            "            weight.mul_(1.0 - weight_decay * learning_rate)\n"
            "        weight.addcmul_(update, rate, value=-1.0)\n",
            "        weight.addcmul_(update, rate, value=-1.0)\n"
            "        if weight_decay:\n"
            "            weight.mul_(1.0 - weight_decay * learning_rate)\n",
            "test_adafactor_by_hand",
        ),
    ),
    *_of(
        "kernels/blockwise.py",
        "tests/kernels/test_blockwise.py",
        (
            "decades without a sign are cut as those with one",
            "(decade if signed else decade + 1)",
            "(decade)",
            "test_the_map_is_theirs",
        ),
        (
            "a tie goes up",
            "torch.bucketize(scaled, bounds, out_int32=True)",
            "torch.bucketize(scaled, bounds, out_int32=True, right=True)",
            "test_a_tie_goes_down",
        ),
        (
            "the value to the left is taken for the nearest",
            "return (values[:-1] + values[1:]) / 2",
            "return values[1:]",
            "test_no_number_is_nearer_to_another_value",
        ),
        (
            "a block too small for a reciprocal is no number",
            "largest.clamp(min=_TINY)",
            "largest",
            "test_zeros_and_numbers_too_small_for_a_reciprocal_stay_finite",
        ),
    ),
    *_of(
        "train/optim/eight_bit.py",
        "tests/train/test_eight_bit.py",
        (
            "the second moment is kept by the map with a sign",
            "        (v, second, second_largest, False),",
            "        (v, second, second_largest, True),",
            "test_steps_are_those_of_bitsandbytes",
        ),
        (
            "the moments that are kept are those of the step before",
            "    adamw_update(parameter, gradient, m, v, **settings)",
            "    adamw_update(parameter, gradient.clone(), m.clone(), v.clone(), **settings)",
            "test_steps_are_those_of_bitsandbytes",
        ),
        (
            "small parameters are rounded too",
            "    if elements < SMALLEST or is_embedding:",
            "    if is_embedding:",
            "test_small_parameters_and_embeddings_keep_fp32_moments",
        ),
        (
            "embeddings are rounded too",
            "    if elements < SMALLEST or is_embedding:",
            "    if elements < SMALLEST:",
            "test_small_parameters_and_embeddings_keep_fp32_moments",
        ),
        (
            "a piece's blocks are those of the first",
            "blocks = slice(begin // BLOCK, (begin + size) // BLOCK)",
            "blocks = slice(0, size // BLOCK)",
            "test_steps_are_those_of_bitsandbytes",
        ),
    ),
    *_of(
        "kernels/stochastic_rounding.py",
        "tests/kernels/test_stochastic_rounding.py",
        (
            "numbers are rounded to the nearest",
            "    words = mix_words(rows.unsqueeze(-1) ^ columns.unsqueeze(-2))\n",
            "    words = torch.full_like(rows.unsqueeze(-1) ^ columns.unsqueeze(-2), 1 << 31)\n",
            "test_the_mean_over_steps_is_the_number_itself",
        ),
        (
            "fifteen bits are drawn",
            "bitwise_and_(0xFFFF)",
            "bitwise_and_(0x7FFF)",
            "test_the_mean_over_places_too",
        ),
        (
            "every step draws alike",
            "fold(fold(fold(_SALT, seed), step), module_id(name))",
            "fold(fold(_SALT, seed), module_id(name))",
            "test_draws_of_two_parameters_steps_and_seeds_are_not_alike",
        ),
        (
            "rows are counted from this process's first",
            "torch.arange(first, first + count,",
            "torch.arange(0, count,",
            "test_rows_are_rounded_as_the_whole",
        ),
    ),
    *_of(
        "train/optim/rounded.py",
        "tests/train/test_masters.py",
        (
            "a rank draws as if its rows were the first",
            "begin.get(name, 0) + first",
            "first",
            "test_shared_rows_are_rounded_as_the_whole",
        ),
        (
            "every block of AdamW draws as the first",
            "(span.name,), begin // span.row)",
            "(span.name,), 0)",
            "test_an_update_is_the_fp32_one_rounded_by_the_rule",
        ),
        (
            "AdamW's weights are rounded to the nearest",
            "    parameter.copy_(to_bf16(exact))",
            "    parameter.copy_(exact)",
            "test_updates_far_below_half_a_step_of_bf16_add_up",
        ),
        (
            "Adafactor's weights are rounded to the nearest",
            "to_bf16(weight.addcmul_(update(block), rate, value=-1.0), block.start)",
            "weight.addcmul_(update(block), rate, value=-1.0)",
            "test_updates_far_below_half_a_step_of_bf16_add_up",
        ),
        (
            "the gradient is taken as it is for the update's second making",
            "        return part.mul_(gradient_factor) if gradient_factor != 1.0 else part",
            "        return part",
            "test_an_update_is_the_fp32_one_rounded_by_the_rule",
        ),
    ),
    *_of(
        "train/optim/paged.py",
        "tests/train/test_paged.py",
        (
            "a bucket is fetched before its buffer is free",
            "            boundary.wait(FETCH, buffer.free)\n",
            "",
            "test_updates_are_adamw_s_bit_for_bit_in_two_buckets_at_a_time",
        ),
        (
            "an update does not wait for its moments",
            "            boundary.wait(COMPUTE, arrived)\n",
            "",
            "test_updates_are_adamw_s_bit_for_bit_in_two_buckets_at_a_time",
        ),
        (
            "a bucket is stored before it is computed",
            "            boundary.wait(STORE, boundary.record(COMPUTE))\n",
            "",
            "test_updates_are_adamw_s_bit_for_bit_in_two_buckets_at_a_time",
        ),
        (
            "a checkpoint reads what is not stored yet",
            "        self._boundary.finish()",
            "        pass",
            "test_a_checkpoint_is_read_from_the_host_s_memory_and_written_to_it",
        ),
        (
            "three buckets are on the device",
            "BUFFERS = 2",
            "BUFFERS = 3",
            "test_updates_are_adamw_s_bit_for_bit_in_two_buckets_at_a_time",
        ),
    ),
    *_of(
        "train/plan/decide.py",
        "tests/train/test_paged.py",
        (
            "moments go to the host whatever the memory",
            "    return saves > 0 and needed > machine.memory, there",
            "    return saves > 0, there",
            "test_it_pages_where_a_card_s_memory_asks_for_it",
        ),
    ),
    *_of(
        "train/kernel_check.py",
        "tests/train/test_kernel_check.py",
        (
            "the check of the residual stream's addition drops nothing",
            "[ours.add(*t, _draw(s))]",
            "[ours.add(*t)]",
            "test_a_kernel_that_is_wrong_differs",
        ),
        (
            "a kernel that makes no number passes",
            "            if not away <= bound:",
            "            if away > bound:",
            "test_a_kernel_that_is_wrong_differs",
        ),
        (
            "gradients of kernels are not compared",
            "    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]",
            "    return outputs",
            "test_a_kernel_that_is_wrong_differs",
        ),
        (
            "a wrong kernel is passed over",
            "        if fault := disagreement(ours, name, device, COMPUTE_DTYPES[precision]):",
            "        if fault := None:",
            "test_a_wrong_kernel_ends_the_run_in_one_sentence",
        ),
        (
            "what another card was checked for holds here",
            '        "device": card,\n',
            "",
            "test_the_outcome_is_recorded_and_a_resume_reuses_it",
        ),
        (
            "a resume checks its kernels again",
            "    if folder is not None and _told_by(folder) == found:\n        return found\n",
            "",
            "test_the_outcome_is_recorded_and_a_resume_reuses_it",
        ),
    ),
    *_of(
        "train/assemble.py",
        "tests/train/test_device.py",
        (
            "a deterministic run fills each tensor before it is written",
            "        filling.fill_uninitialized_memory = False",
            "        filling.fill_uninitialized_memory = True",
            "test_a_deterministic_run_does_not_fill_what_it_is_about_to_write",
        ),
    ),
    *_of(
        "train/process/memory.py",
        "tests/train/test_device.py",
        (
            "the user's configuration of the allocator is overwritten",
            "    if not any(name in os.environ for name in _ALLOCATOR):",
            "    if True:",
            "test_blocks_of_memory_grow_unless_the_user_says_otherwise",
        ),
    ),
    *_of(
        "train/plan/decide.py",
        "tests/train/test_decide.py",
        (
            "layers are compiled around Triton's kernels",
            'if config.train.compile and kernels is not None and "triton" in kernels:',
            "if False:",
            "test_compiled_layers_do_not_go_through_triton_s_kernels",
        ),
        (
            "auto takes bf16 where it is emulated",
            "is_bf16_supported(including_emulation=False)",
            "is_bf16_supported()",
            "test_auto_on_cuda_does_not_count_emulation",
        ),
        (
            "tokens of a micro-batch are decided anew for the plan",
            "return config.train.per_device_train_batch_size * config.data.max_length",
            "return config.train.per_device_train_batch_size * 60",
            "test_automatic_tokens_are_those_of_the_padded_micro_batch",
        ),
        (
            "a laptop's plan is one for its processor",
            '    if config.train.device == "auto" and device == "cpu":\n        return UNKNOWN\n',
            "",
            "test_a_machine_without_an_accelerator_plans_for_one_unless_the_cpu_is_named",
        ),
        (
            "recomputing is decided where no device is known",
            'None, "auto: no device is known yet"\n'
            '    if machine.memory is None:\n        return "none"',
            'False, "auto: no device is known yet"\n'
            '    if machine.memory is None:\n        return "none"',
            "test_recomputing_only_where_memory_needs_it",
        ),
        (
            "attention with dropout is planned as fused on a processor",
            'dropout > 0 and device not in (None, "cuda")',
            'dropout > 1 and device not in (None, "cuda")',
            "test_what_is_planned_is_what_runs",
        ),
        (
            "a base in another half precision is let through",
            "and stored not in agreeing:",
            "and stored in agreeing and stored not in agreeing:",
            "tests/train/test_prepare.py"
            "::test_a_frozen_base_is_stored_in_fp32_or_in_what_is_computed_in",
        ),
    ),
    *_of(
        "train/plan/sharing.py",
        "tests/train/test_plan_over_ranks.py",
        (
            "a layer is gathered once for both passes",
            "2 * layers * micro_batches",
            "layers * micro_batches",
            "test_what_ranks_send_in_a_step",
        ),
        (
            "adapters' gradients are sent as if they were shared",
            "return [*gathers, gradients]",
            "return gathers",
            "test_what_ranks_send_in_a_step",
        ),
        (
            "a ring sends a tensor whole",
            "(ranks - 1) / ranks",
            "1.0",
            "test_what_ranks_send_in_a_step",
        ),
    ),
    *_of(
        "train/plan/sizes.py",
        "tests/train/test_plan_over_ranks.py",
        (
            "rows that do not divide are rounded down",
            "-(-shape[0] // ranks)",
            "shape[0] // ranks",
            "test_rows_that_do_not_divide_are_rounded_up",
        ),
    ),
    *_of(
        "models/cache.py",
        "tests/models/test_layers.py",
        (
            "the cache's length moves on with each layer",
            "        keys, values = self._layers[layer]\n",
            "        keys, values = self._layers[layer]\n        self.length += layer\n",
            "test_decoding_with_a_cache_equals_the_full_pass",
        ),
    ),
    *_of(
        "models/layers.py",
        "tests/models/test_recompute.py",
        (
            "layers are not computed again though it is asked",
            'if torch.is_grad_enabled() else ("none", None)',
            'if not torch.is_grad_enabled() else ("none", None)',
            "test_each_policy_keeps_less_than_the_one_before",
        ),
        (
            "under mlp norms are kept",
            'remake = policy in ("norms", "mlp")',
            'remake = policy == "norms"',
            "test_each_policy_keeps_less_than_the_one_before",
        ),
    ),
    *_of(
        "kernels/linears.py",
        "tests/train/test_streaming.py",
        (
            "layers without adapters add their gradients in another order where they are streamed",
            "isinstance(layer.weight, _WHOLE)",
            "isinstance(layer.weight, Tensor)",
            "test_streamed_layers_give_the_bits_of_resident_ones[qwen2-lowered-some]",
        ),
    ),
    *_of(
        "kernels/streamed.py",
        "tests/train/test_streaming.py",
        (
            "a layer is read before it came",
            "            self._boundary.wait(COMPUTE, self._arrivals[place])\n",
            "",
            "test_a_pass_that_was_given_up_leaves_nothing_behind",
        ),
        (
            "backward the layer above is sent for",
            "following = layer + 1 if upwards else layer - 1",
            "following = layer + 1",
            "test_each_layer_is_sent_for_while_the_one_before_computes",
        ),
        (
            "a place is taken to hold what it held",
            "        if self._holds[place] != layer:",
            "        if self._holds[place] is None:",
            "test_a_pass_that_was_given_up_leaves_nothing_behind",
        ),
        (
            "a copy does not wait for the kernels that read its place",
            "            self._boundary.wait(FETCH, self._boundary.record(COMPUTE))\n",
            "",
            "test_on_cuda_copies_wait_for_the_kernels_before_and_kernels_for_their_layer",
        ),
        (
            "a parameter keeps its memory beside the stream's",
            "parameter.data = place.copy_(parameter.data)",
            "place.copy_(parameter.data)",
            "test_weights_keep_their_names_and_numbers",
        ),
    ),
    *_of(
        "train/plan/decide.py",
        "tests/train/test_streaming.py",
        (
            "layers are streamed where they need not be",
            'return saves > 0 and needed > machine.memory, f"auto: {there}"',
            'return saves > 0, f"auto: {there}"',
            "test_auto_streams_only_where_the_strongest_policy_does_not_suffice",
        ),
        (
            "who streams and who shares is decided apart",
            ' or config.model.stream_layers == "true":',
            ":",
            "test_auto_streams_only_where_the_strongest_policy_does_not_suffice",
        ),
    ),
    *_of(
        "train/plan/sizes.py",
        "tests/train/test_streaming.py",
        (
            "one layer is counted on the device",
            "return numbers, 2 * -(-numbers // layers) * stored + lowered",
            "return numbers, -(-numbers // layers) * stored + lowered",
            "test_fifteen_billion_parameters_fit_24_gb_and_the_plan_says_how",
        ),
    ),
    *_of(
        "models/recompute.py",
        "tests/models/test_recompute.py",
        (
            "what is computed again is so outside autocast",
            "with torch.enable_grad(), ctx.autocast():",
            "with torch.enable_grad():",
            "test_no_policy_changes_a_bit",
        ),
        (
            "an offloaded input is kept on the device as well",
            "        if kept is None:\n            ctx.save",
            "        if True:\n            ctx.save",
            "test_an_offloaded_input_is_in_the_ring_alone_and_comes_back_from_there",
        ),
        (
            "what was on its way to a micro-batch that was given up comes to the next one",
            "        self._coming.pop(layer, None)  # of a micro-batch that was given up\n",
            "",
            "test_a_ring_grows_and_forgets_what_was_given_up",
        ),
        (
            "the layer above is brought back while one is computed again",
            "            self._fetch(layer - 1, device)",
            "            self._fetch(layer, device)",
            "test_on_cuda_copies_wait_for_what_they_read_and_readers_for_them",
        ),
        (
            "an input is read before it has come back",
            "            torch.cuda.current_stream(device).wait_event(there)\n",
            "            pass\n",
            "test_on_cuda_copies_wait_for_what_they_read_and_readers_for_them",
        ),
        (
            "an input leaves before it is made",
            "        self._stream.wait_stream(torch.cuda.current_stream(on_device.device))\n",
            "",
            "test_on_cuda_copies_wait_for_what_they_read_and_readers_for_them",
        ),
    ),
    *_of(
        "kernels/pinned.py",
        "tests/train/test_paged.py",
        (
            "host memory is not pinned",
            "if error := pin(tensor):",
            "if error := 0:",
            "tests/train/test_streaming.py"
            "::test_on_cuda_copies_wait_for_the_kernels_before_and_kernels_for_their_layer",
        ),
        (
            "memory that is given back stays pinned",
            "        weakref.finalize(tensor, cuda.cudaHostUnregister, tensor.data_ptr())\n",
            "        pass\n",
            "test_a_cuda_boundary_has_two_streams_that_last_and_pins_memory_where_it_lies",
        ),
    ),
    *_of(
        "kernels/remade.py",
        "tests/models/test_recompute.py",
        (
            "gradients of what several layers read are added the first first",
            "for i in reversed(range(len(grads))):",
            "for i in range(len(grads)):",
            "test_no_policy_changes_a_bit",
        ),
        (
            "a remade input is made outside autocast",
            "        with ctx.autocast():\n            x = ctx.again(*sources).to(ctx.dtype)",
            "        if True:\n            x = ctx.again(*sources).to(ctx.input_dtype)",
            "test_no_policy_changes_a_bit",
        ),
    ),
    *_of(
        "train/plan/activations.py",
        "tests/train/test_plan.py",
        (
            "the plan counts what attention gives twice",
            "kept: float = 2 * (query + key) * compute",
            "kept: float = (3 * query + 2 * key) * compute",
            "tests/benchmarks/test_traffic.py::test_the_plan_s_activations_are_what_a_step_keeps",
        ),
        (
            "the plan of a GPU counts inputs that are made again",
            'config.train.method == "lora" and device not in (None, "cpu")',
            'config.train.method == "lora" and device not in (None, "cpu", "cuda")',
            "tests/benchmarks/test_traffic.py::test_the_plan_s_activations_are_what_a_step_keeps",
        ),
        (
            "the plan of mlp counts what its layers keep of the MLP",
            "return Activations(norms_kept - mlp, within)",
            "return Activations(norms_kept, within)",
            "test_activations_are_what_autograd_saves",
        ),
        (
            "the plan of norms forgets what is made again",
            "0 if makes_again else intermediate * compute)",
            "0)",
            "tests/train/test_memory.py::test_the_peak_is_as_predicted",
        ),
    ),
    *_of(
        "train/plan/decide.py",
        "tests/train/test_decide.py",
        (
            "auto takes the first policy whether it fits or not",
            "for policy, total in needed.items() if total <= machine.memory), least)",
            "for policy, total in needed.items() if total >= machine.memory), least)",
            "test_recomputing_only_where_memory_needs_it",
        ),
        (
            "inputs are offloaded where there is no other memory",
            'if device in (None, "cuda") else everywhere',
            'if device in (None, "cuda", "cpu") else everywhere',
            "test_where_layers_are_compiled_they_are_kept_or_computed_again_whole",
        ),
    ),
    *_of(
        "train/healing.py",
        "tests/train/test_healing.py",
        (
            "memory that does not suffice is asked for once more",
            "        state.micro_batch_divisor *= 2\n",
            "        state.micro_batch_divisor *= 4\n",
            "tests/train/test_step_faults.py::test_it_is_halved_until_it_fits",
        ),
        (
            "the state does not keep the policy that memory asked for",
            "state.gradient_checkpointing = model.gradient_checkpointing = stronger",
            "model.gradient_checkpointing = stronger",
            "test_a_run_goes_on_keeping_less_and_so_does_its_resume",
        ),
        (
            "the look ahead leaves its gradient",
            "        run.optimizer.clear_gradients()\n",
            "",
            "test_the_longest_micro_batch_is_tried_and_leaves_no_trace",
        ),
        (
            "the look ahead takes the shortest step",
            "return max(range(run.state.step + 1, run.plan.total_steps + 1), key=most)",
            "return min(range(run.state.step + 1, run.plan.total_steps + 1), key=most)",
            "test_the_longest_micro_batch_is_tried_and_leaves_no_trace",
        ),
    ),
    *_of(
        "train/assemble.py",
        "tests/train/test_healing.py",
        (
            "a resume forgets the policy that memory asked for",
            "kept_policy(config.model.gradient_checkpointing, state)",
            "config.model.gradient_checkpointing",
            "test_a_run_goes_on_keeping_less_and_so_does_its_resume",
        ),
    ),
    *_of(
        "train/plan/memory.py",
        "tests/train/test_plan_over_ranks.py",
        (
            "a base that fits with recomputing is shared",
            'allowed = possible if setting == "auto" else (setting,)',
            'allowed = ("none",)',
            "test_seed_002_fits_its_gpus",
        ),
    ),
    *_of(
        "train/survey.py",
        "tests/train/test_plan_over_ranks.py",
        (
            "a plan of what cannot start ends well",
            "code = 2 if all(",
            "code = 0 if all(",
            "test_a_plan_of_what_cannot_start_ends_with_2",
        ),
    ),
    *_of(
        "train/plan/ledger.py",
        "tests/train/test_plan.py",
        (
            "a micro-batch by tokens holds more than a step",
            "tokens = max(min(tokens, budget), longest)",
            "tokens = max(budget, longest)",
            "test_largest_micro_batch",
        ),
        (
            "the plan thinks that the first norm over frozen embeddings keeps its input",
            'if sizes.trains_embedding or policy != "none" or',
            'if full or policy == "none" or',
            "test_activations_are_what_autograd_saves",
        ),
    ),
    *_of(
        "train/survey.py",
        "tests/train/test_run.py",
        (
            "a plan does not look at the weights",
            "    if not isinstance(decoder, Unknown):\n        check_weights(",
            "    if isinstance(decoder, Unknown):\n        check_weights(",
            "test_bad_input_ends_in_one_sentence",
        ),
        (
            "a plan does not look at the run's folder",
            "    if new:\n        run_folder(config)",
            "    if not new:\n        run_folder(config)",
            "test_an_existing_run_is_never_overwritten",
        ),
    ),
    *_of(
        "train/config/spellings.py",
        "tests/train/test_spellings.py",
        (
            "false beside nothing is fp32",
            "if value is False and layer.get(other) is False:",
            "if value is False and layer.get(other) is not True:",
            "test_a_value_that_means_something_else_is_never_misread",
        ),
        (
            "a number of rows is taken for a share",
            "if not number or not 0 <= value / whole < 1:",
            "if not number:",
            "test_a_value_that_means_something_else_is_never_misread",
        ),
        (
            "what is not supported is passed over",
            "        if plain(value) in _OFF:\n",
            "        if True:\n",
            "test_what_is_not_supported_says_so",
        ),
    ),
    *_of(
        "train/precision.py",
        "tests/train/test_precision.py",
        (
            "the scale grows a step too early",
            "if self.good_steps == self.growth_interval:",
            "if self.good_steps == self.growth_interval - 1:",
            "test_it_doubles_after_2000_good_steps_and_not_after_1999",
        ),
        (
            "an overflow does not start the count anew",
            "            self.good_steps = 0\n            return\n",
            "            return\n",
            "test_an_overflow_starts_the_count_anew",
        ),
        (
            "the scale grows beyond fp32",
            "grown if grown <= torch.finfo(torch.float32).max else self.scale",
            "grown",
            "test_the_scale_stays_finite_in_fp32",
        ),
        (
            "fp16 is trained without a loss scaler",
            'return self.name == "fp16"',
            'return self.name == "fp61"',
            "tests/train/test_resume.py::test_a_resume_goes_on_with_the_loss_scale",
        ),
    ),
    *_of(
        "train/loop.py",
        "tests/train/test_loop.py",
        (
            "the train loss since an evaluation is a mean of means",
            "state.loss_since_eval += result.loss * result.targets",
            "state.loss_since_eval += result.loss",
            "test_the_train_loss_since_the_last_evaluation_is_a_token_mean",
        ),
        (
            "losses that are not finite count on over good steps",
            "state.non_finite_in_a_row + 1 if not_finite else 0",
            "state.non_finite_in_a_row + not_finite",
            "test_three_steps_in_a_row_that_are_not_finite_end_it",
        ),
        (
            "a signal ends the run unsaved",
            "ends_here = stop is not None or not_finite or",
            "ends_here = not_finite or",
            "test_a_signal_ends_it_after_the_step_with_a_save",
        ),
        (
            "every step after a request saves",
            "            signals.save = False\n",
            "            pass\n",
            "test_a_request_to_save_is_answered_once",
        ),
    ),
    *_of(
        "data/holes.py",
        "tests/data/test_fim.py",
        (
            "pairs of places are not alike",
            "    other += other >= one\n",
            "    other += other == one\n",
            "test_every_pair_of_places_is_alike",
        ),
        (
            "columns of the parser are taken for characters",
            "len(characters.encode()[:column].decode())",
            "len(characters[:column])",
            "test_a_node_is_cut_where_the_parser_says",
        ),
        (
            "the parts of an f-string are cut",
            "[] if isinstance(node, ast.JoinedStr) else list(ast.iter_child_nodes(node))",
            "list(ast.iter_child_nodes(node)) if isinstance(node, ast.expr | ast.stmt) else []",
            "test_an_f_string_is_cut_as_a_whole",
        ),
        (
            "a single line is the hole itself",
            "places = sorted(starts) if len(starts) > 2 else places",
            "places = sorted(starts)",
            "test_lines_are_cut_at_their_beginnings_and_characters_anywhere",
        ),
        (
            "a node may be all there is",
            "        if text[:start].strip() or text[stop:].strip()\n",
            "",
            "test_a_node_leaves_something_around_it",
        ),
    ),
    *_of(
        "data/fim.py",
        "tests/data/test_fim.py",
        (
            "a hole does not know its epoch",
            "counter = np.array([0, part, row, epoch], dtype=np.uint64)",
            "counter = np.array([0, part, row, 0], dtype=np.uint64)",
            "test_holes_are_a_function_of_seed_epoch_and_row",
        ),
        (
            "a hole does not know its row",
            "counter = np.array([0, part, row, epoch], dtype=np.uint64)",
            "counter = np.array([0, part, 0, epoch], dtype=np.uint64)",
            "test_rows_that_are_alike_have_holes_of_their_own",
        ),
        (
            "Code Llama's suffix begins with a space",
            "anchored = [_ANCHOR + text for text in texts]",
            'anchored = [_ANCHOR + " " + text for text in texts]',
            "test_a_text_with_a_hole_is_the_text_again",
        ),
        (
            "Code Llama's prefix begins without its space",
            'return f" {text}" if self._spaced and text else text',
            "return text",
            "test_code_llama_s_prompts_are_those_of_its_authors",
        ),
        (
            "Code Llama's prefix and middle are encoded apart after the suffix",
            "if suffix_first and self._spaced:",
            "if False:",
            "test_code_llama_s_prompts_are_those_of_its_authors",
        ),
        (
            "the beginning of the suffix is left out, not its end",
            "        rest = rest[:room]\n",
            "        rest = rest[-room:] if room else []\n",
            "test_no_example_exceeds_its_bound_and_only_the_suffix_loses_its_end",
        ),
        (
            "an example exceeds its bound",
            "        rest = rest[:room]\n",
            "",
            "test_no_example_exceeds_its_bound_and_only_the_suffix_loses_its_end",
        ),
        (
            "the end of the middle is not there",
            "return Parts(ids, [*said, self.end_id])",
            "return Parts(ids, [*said, said[-1]])",
            "test_the_end_of_the_hole_is_trained_and_with_middle_nothing_before_it",
        ),
        (
            "the prompt is trained where the middle alone is asked for",
            "            labels[: len(parts.before)] = IGNORED\n",
            "            labels[: len(parts.before) - 1] = IGNORED\n",
            "test_the_end_of_the_hole_is_trained_and_with_middle_nothing_before_it",
        ),
        (
            "a hole is cut into the system prompt",
            "self._piece(row.text[start:stop], max(0, row.prompt - start))",
            "self._piece(row.text[start:stop], 0)",
            "test_the_system_prompt_is_never_in_a_hole",
        ),
        (
            "a text with tokens of the format gets a hole",
            "if piece.holds_tokens or words[0] >= self.rate * 2**64:",
            "if words[0] >= self.rate * 2**64:",
            "test_what_cannot_be_cut_stays_whole_and_is_counted",
        ),
        (
            "texts of a split row overlap",
            "cuts = [character(start) for start, _ in parts] + [character(parts[-1][1])]",
            "cuts = [character(start + 1) for start, _ in parts] + [character(parts[-1][1])]",
            "test_the_parts_of_a_split_row_are_its_text",
        ),
    ),
    *_of(
        "data/arrays.py",
        "tests/data/test_fim.py",
        (
            "texts are not vouched for by their hash",
            "            if (array := getattr(self, field.name)) is not None:\n",
            "            if (array := getattr(self, field.name)) is not None"
            ' and field.name != "texts":\n',
            "test_texts_are_kept_only_where_holes_are_asked_for",
        ),
    ),
    *_of(
        "train/evaluation/holes.py",
        "tests/train/test_runs_with_holes.py",
        (
            "a text that runs on fills a hole",
            "return len(said) < most and tokens.text(said) == tokens.text(middle)",
            "return tokens.text(said).startswith(tokens.text(middle))",
            "test_a_hole_is_filled_where_the_text_is_the_same_and_ends",
        ),
        (
            "the family's end of a middle does not end it",
            "    stop_ids |= {fim.tokens.end_id}\n",
            "    stop_ids = frozenset({-1})\n",
            "test_a_hole_is_filled_where_the_text_is_the_same_and_ends",
        ),
    ),
    *_of(
        "train/batches.py",
        "tests/train/test_runs_with_holes.py",
        (
            "every epoch has the holes of the first",
            "self.examples.at_epoch(epoch), self.order",
            "self.examples.at_epoch(0), self.order",
            "test_every_epoch_has_holes_of_its_own_and_the_valid_set_those_of_one",
        ),
    ),
    *_of(
        "train/batches.py",
        "tests/train/test_loop.py",
        (
            "an order of another epoch is kept",
            "if self._order is None or self._order[0] != epoch:",
            "if self._order is None:",
            "test_it_does_what_the_plan_says_in_this_order",
        ),
        (
            "what was cut ahead is handed out for another cut",
            "if ahead is not None and ahead[0] == asked:",
            "if ahead is not None:",
            "test_the_next_step_is_cut_ahead_and_handed_out_once",
        ),
        (
            "groups by length are of a micro-batch, not a step",
            "group_size=self.effective_batch_size,",
            "group_size=self.batching.micro_batch_size,",
            "test_batches_are_cut_and_ordered_as_configured",
        ),
    ),
    *_of(
        "train/state.py",
        "tests/train/test_early_stopping.py",
        (
            "an equal loss is a new best",
            "improved = finite and gain > 0",
            "improved = finite and gain >= 0",
            "test_an_equal_loss_is_no_improvement",
        ),
        (
            "any gain resets the patience",
            "if finite and gain > self.threshold else",
            "if finite and gain > 0 else",
            "test_small_gains_move_the_best_but_do_not_reset_patience",
        ),
        (
            "patience lasts one evaluation longer",
            "self.failures >= self.patience",
            "self.failures > self.patience",
            "test_stops_when_patience_is_used_up_and_keeps_the_best",
        ),
        (
            "an infinite loss may be the best",
            "improved = finite and gain > 0",
            "improved = gain > 0",
            "test_a_loss_that_is_not_finite_is_a_failure_and_never_the_best",
        ),
    ),
    *_of(
        "train/state.py",
        "tests/train/test_spikes.py",
        (
            "the deviation is that of the whole, not of a sample",
            "squares / (len(recent) - 1)",
            "squares / len(recent)",
            "test_more_than_six_deviations_above_the_mean_is_a_spike",
        ),
        (
            "a spike stays out of the window",
            "    recent.append(loss)\n",
            "    if spike is None:\n        recent.append(loss)\n",
            "test_the_window_moves_and_holds_spikes_too",
        ),
        (
            "a loss far below is a spike",
            "loss - mean > DEVIATIONS * deviation",
            "abs(loss - mean) > DEVIATIONS * deviation",
            "test_more_than_six_deviations_above_the_mean_is_a_spike",
        ),
    ),
    *_of(
        "train/evaluate.py",
        "tests/train/test_evaluate.py",
        (
            "evaluation is a mean of batch means",
            "        losses.append(loss)\n",
            "        losses.append(loss / micro_batch.num_targets * len(examples))\n",
            "test_it_is_the_token_mean_without_dropout",
        ),
        (
            "evaluation drops",
            "partial(loss_sum, model, micro_batch, device, draw=None)",
            "partial(loss_sum, model, micro_batch, device, draw=(0, 1))",
            "test_it_is_the_token_mean_without_dropout",
        ),
        (
            "evaluation records a graph",
            "@torch.no_grad()\ndef evaluate(",
            "def evaluate(",
            "test_longest_come_first_in_the_run_s_precision_and_nothing_is_recorded",
        ),
        (
            "examples behind a batch that was halved are left out",
            "            size = len(micro_batch.examples) // 2\n            continue\n",
            "            size = len(micro_batch.examples) // 2\n            done += size\n"
            "            continue\n",
            "tests/train/test_step_faults.py::test_an_evaluation_goes_on_in_smaller_batches",
        ),
    ),
    *_of(
        "train/process/memory.py",
        "tests/train/test_step_faults.py",
        (
            "what an earlier run left is freed in the midst of this one",
            "        gc.collect()  # what",
            "        # what",
            "tests/train/test_memory.py"
            "::test_what_an_earlier_run_left_does_not_hide_what_this_one_takes",
        ),
        (
            "any RuntimeError is a lack of memory",
            "any(text in str(error) for text in _MESSAGES)",
            "bool(_MESSAGES)",
            "test_another_error_is_no_lack_of_memory",
        ),
        (
            "what did not fit is still held while memory is given back",
            "            raise\n"
            "    # Below the block, not in it: up to its end the error's frames hold what did not"
            " fit.\n    if device.type",
            '            raise\n        if device.type == "cuda":\n'
            "            torch.cuda.empty_cache()\n        return None\n    if device.type",
            "test_what_did_not_fit_is_gone_when_memory_is_given_back",
        ),
    ),
    *_of(
        "train/saving/checkpoints.py",
        "tests/train/test_checkpoint.py",
        (
            "a folder beyond the limit is deleted under its name",
            "            self.path(step).rename(trash)\n"
            '            faultpoint("rotation.renamed")\n            shutil.rmtree(trash)\n',
            '            faultpoint("rotation.renamed")\n'
            "            shutil.rmtree(self.path(step))\n",
            "test_an_old_checkpoint_goes_when_the_new_one_is_on_the_disk",
        ),
        (
            "the best checkpoint is deleted with the old ones",
            "kept = {steps[-1], *({best_step} & set(steps))}",
            "kept = {steps[-1]}",
            "test_rotation",
        ),
        (
            "old checkpoints go before the new one is there",
            "            replace_folder(target, fill, step=step)\n"
            '        self.rotate(state["stopping"]["best_step"])\n',
            '            self.rotate(state["stopping"]["best_step"])\n'
            "            replace_folder(target, fill, step=step)\n",
            "test_an_old_checkpoint_goes_when_the_new_one_is_on_the_disk",
        ),
        (
            "a damaged checkpoint is taken",
            "            problem = damage(self.path(step))\n",
            "            problem = None\n",
            "test_the_newest_verified_one_is_found_and_a_damaged_one_set_aside",
        ),
        (
            "a full disk is met in the middle of writing",
            "    if free < expected_bytes:\n",
            "    if False:\n",
            "test_a_full_disk_ends_in_one_sentence_and_leaves_what_was_there",
        ),
        (
            "a checkpoint of the step that is damaged is not written anew",
            "if target.exists() and damage(target) is None:",
            "if target.exists():",
            "test_a_damaged_checkpoint_of_the_same_step_is_written_anew",
        ),
    ),
    *_of(
        "train/state.py",
        "tests/train/test_checkpoint.py",
        (
            "true is taken for the number 1",
            "if isinstance(value, bool) or (isinstance(value, int)",
            "if (isinstance(value, int)",
            "test_a_state_of_other_types_is_refused",
        ),
    ),
    *_of(
        "train/saving/resume.py",
        "tests/train/test_resume.py",
        (
            "a run that is finished at an older step counts as finished",
            ' and status.get("step") == step',
            "",
            "test_a_run_killed_before_its_resume_said_so_is_not_finished",
        ),
        (
            "steps that are done again count as done under the schedule before",
            "            until = min(until, self.state.step)\n",
            "",
            "test_each_change_of_length_is_kept_and_what_is_done_again_follows_the_last",
        ),
        (
            "a resume without a change is told as one",
            "        while followed and followed[-1][1] == plan:\n            followed.pop()\n",
            "",
            "test_a_resume_that_changes_no_length_redraws_nothing",
        ),
        (
            "a checkpoint that was named is taken though it is damaged",
            "        problem = damage(place)\n",
            "        problem = None\n",
            "test_a_damaged_checkpoint_that_was_named_is_an_error",
        ),
    ),
    *_of(
        "train/saving/identity.py",
        "tests/train/test_resume.py",
        (
            "a resume goes on with other data",
            "        if was != fingerprint:\n",
            "        if was is None:\n",
            "test_the_data_fingerprint_is_compared_not_only_the_path",
        ),
        (
            "a resume goes on with other settings",
            "if key not in may_change and was != value:",
            "if key not in may_change and was is None:",
            "test_an_edited_configuration_is_refused_with_both_values",
        ),
        (
            "a resume goes on from another base model",
            "    if differing:\n",
            "    if len(differing) > 1:\n",
            "test_another_base_model_of_the_same_size_is_refused",
        ),
        (
            "other threads are not spoken of",
            'if saved["machine"].get(name) != value',
            'if name not in saved["machine"]',
            "test_other_threads_are_warned_about",
        ),
    ),
    *_of(
        "train/config/load.py",
        "tests/train/test_run_config.py",
        (
            "what decides results may change with a resume",
            "        if not KEYS[path].rule.on_resume:\n",
            "        if False:\n",
            "test_only_length_cadence_and_logging_may_change_on_resume",
        ),
        (
            "of two names of one key the later rules in silence",
            "    if before is None or same or not (before.spelled or entry.spelled):\n",
            "    if before is None or same or before.spelled or entry.spelled:\n",
            "tests/train/test_spellings.py"
            "::test_two_names_of_one_key_with_two_values_are_a_contradiction",
        ),
        (
            "an accident decides between several keys",
            "    if not section and name in SEVERAL:\n",
            "    if section and name in SEVERAL:\n",
            "tests/train/test_spellings.py::test_what_could_mean_several_keys_is_refused_naming_them",
        ),
        (
            "what is taken is not said",
            "    if taken:\n",
            "    if not taken:\n",
            "tests/train/test_spellings.py::test_what_is_certain_is_taken_and_said",
        ),
    ),
    *_of(
        "train/saving/saver.py",
        "tests/train/test_background.py",
        (
            "what is saved in the background is what training goes on with",
            "            tensors, moments = copied(tensors), copied(moments)\n",
            "            pass\n",
            "test_a_save_holds_the_weights_of_its_step_though_training_goes_on",
        ),
        (
            "rows of metrics are not on the disk when a checkpoint relies on them",
            "            self.sync()\n            self._together(",
            "            self._together(",
            "test_what_a_save_speaks_of_is_on_the_disk_before_it",
        ),
        (
            "the state does not know of the loss scaler",
            "run.state.scaler = run.scaler.state() if run.scaler is not None else None",
            "run.state.scaler = None",
            "tests/train/test_resume.py::test_a_resume_goes_on_with_the_loss_scale",
        ),
        (
            "minutes between saves are seconds",
            "> 60 * minutes",
            "> minutes",
            "test_minutes_between_saves_are_minutes",
        ),
    ),
    *_of(
        "train/saving/restore.py",
        "tests/train/test_resume.py",
        (
            "moments are not taken up",
            "        run.optimizer.load_state(own_state(run.optimizer, state_of_all))\n",
            "",
            "test_one_checkpoint_can_be_resumed_from",
        ),
        (
            "a stopped run's patience begins anew",
            "    state, warnings = run.state, []\n",
            "    state, warnings = run.state, []\n    state.stopping.failures = 0\n",
            "test_stopped_and_resumed_equals_uninterrupted[early stopping counting, eager]",
        ),
        (
            "newer checkpoints stay where a run goes on from an older one",
            "    checkpoints.set_newer_aside(state.step)\n",
            "",
            "test_newer_checkpoints_are_put_aside_when_an_older_one_is_taken",
        ),
    ),
    *_of(
        "train/saving/saver.py",
        "tests/train/test_background.py",
        (
            "an error of the writer is told to nobody",
            "            job.result()\n",
            "            job.exception()\n",
            "test_what_a_job_ended_with_is_raised_once",
        ),
        (
            "two saves are in flight at once",
            "        self.wait()\n        self._job",
            "        self._job",
            "test_a_job_runs_while_the_caller_goes_on",
        ),
    ),
    *_of(
        "train/log/metrics.py",
        "tests/train/test_metrics.py",
        (
            "a row waits in Python's buffer",
            "        self._file.flush()\n",
            "",
            "test_rows_are_written_whole_unrounded_and_at_once",
        ),
        (
            "steps stand twice after a resume",
            'row["step"] <= resume_step)',
            'row["step"] <= resume_step + 1)',
            "test_a_resume_drops_what_lies_beyond_the_checkpoint",
        ),
        (
            "rows are synced nowhere",
            "        os.fsync(self._file.fileno())\n",
            "",
            "tests/train/test_background.py::test_what_a_save_speaks_of_is_on_the_disk_before_it",
        ),
        (
            "NaN is written, which is not JSON",
            "return None if isinstance(value, float) and not math.isfinite(value) else value",
            "return value",
            "test_a_number_that_is_not_finite_is_null",
        ),
        (
            "the speed that is shown counts steps of before the last logged one",
            "        self._tokens, self._seconds = 0, 0.0\n",
            "",
            "test_the_speed_shown_is_that_since_the_last_logged_step",
        ),
        (
            "TensorBoard shows the steps before a kill a second time",
            "purge_step = resume_step + 1 if resume_step else 0",
            "purge_step = resume_step + 9 if resume_step else 0",
            "test_tensorboard_shows_no_step_twice_after_a_resume",
        ),
    ),
    *_of(
        "train/process/signals.py",
        "tests/train/test_signals.py",
        (
            "a second Ctrl-C waits as the first one does",
            "        if self.stop is not None:\n",
            "        if False:\n",
            "test_the_second_signal_exits_at_once",
        ),
        (
            "handlers stay after the run",
            "            signal.signal(number, handler)\n",
            "            pass\n",
            "test_requests_are_noted_and_handlers_given_back",
        ),
    ),
    *_of(
        "train/merge/fold.py",
        "tests/train/test_merge.py",
        (
            "another program's config.toml ends a merge",
            "with contextlib.suppress(UserError):",
            "with contextlib.nullcontext():",
            "test_another_program_s_config_beside_the_adapter_is_not_asked",
        ),
        (
            "tokenizer files of two models are mixed",
            "    places = [tokenizer / name for name in _TOKENIZER_FILES]\n",
            "    places = [\n"
            "        tokenizer / name if (tokenizer / name).is_file() else base / name\n"
            "        for name in _TOKENIZER_FILES\n    ]\n",
            "test_a_run_gives_its_final_else_its_best_with_the_tokenizer_beside_it",
        ),
        (
            "the dtype is that of most tensors, not of most numbers",
            "elements[info.dtype] += info.num_bytes // info.dtype.itemsize",
            "elements[info.dtype] += 1",
            "test_the_dtype_of_a_checkpoint_is_that_of_most_of_its_numbers",
        ),
        (
            "OUT is written over what is there",
            "    _require_vacant(out)\n",
            "",
            "test_out_must_be_vacant",
        ),
    ),
    *_of(
        "train/saving/artifact.py",
        "tests/train/test_merge.py",
        (
            "best/ comes before final/",
            '(run_or_adapter / "final", run_or_adapter / "best")',
            '(run_or_adapter / "best", run_or_adapter / "final")',
            "test_a_run_gives_its_final_else_its_best_with_the_tokenizer_beside_it",
        ),
    ),
    *_of(
        "train/finish.py",
        "tests/train/test_resume.py",
        (
            "final/ is made of a best/ that is damaged or another step's",
            "not whole_best(best, best_step):\n",
            "not best.exists():\n",
            "test_a_best_that_is_not_that_of_its_step_is_not_handed_out",
        ),
        (
            "the test set is evaluated with the last weights where final/ holds the best",
            "    load_trained(run, best)\n",
            "",
            "test_the_test_set_is_evaluated_with_the_weights_of_final",
        ),
        (
            "a signal after the last step is not answered",
            "reason = agreed(run.world, signals, overdue=False)[0] or reason",
            "agreed(run.world, signals, overdue=False)",
            "test_a_signal_after_the_last_step_is_answered",
        ),
    ),
    *_of(
        "data/prompt.py",
        "tests/data/test_spans.py",
        (
            "the last answer is the conversation's, trained by its row or not",
            "trained = [turn for turn in chat.answers if turn not in chat.left_out]",
            "trained = chat.answers",
            "test_the_last_answer_alone_is_what_weights_on_the_others_leave",
        ),
    ),
    *_of(
        "data/locate.py",
        "tests/data/test_source.py",
        (
            "a part of a data set is taken for the whole",
            'if parts := [name for name in found if "/partial-" in name]:',
            'if parts := [name for name in found if "/parts-" in name]:',
            "test_a_data_set_of_another_form_is_read_as_the_hub_converted_it",
        ),
    ),
    *_of(
        "data/locate.py",
        "tests/data/test_gitignore.py",
        (
            "a folder's files stand between those of its folders",
            "return [*((True, part) for part in folders), (False, last)]",
            "return [*((False, part) for part in folders), (False, last)]",
            "test_a_tree_is_read_in_the_order_of_a_repository",
        ),
        (
            "rows that git is to leave alone are not read",
            "ignored &= sources",
            "pass",
            "test_what_is_spelled_out_is_read",
        ),
    ),
    *_of(
        "train/plan/claims.py",
        "tests/test_seeds.py",
        (
            "the memory that a seed adds up is believed",
            '_LASTING = ("weights", "adapters", "gradients", "optimizer")',
            '_LASTING = ("weights", "optimizer")',
            "test_each_claim_is_confirmed_or_refuted_with_the_right_value",
        ),
    ),
    *_of(
        "train/plan/text.py",
        "tests/test_seeds.py",
        (
            "a wrong number of a seed is printed as right",
            'mark = "✓" if claim["holds"] else "✗"',
            'mark = "✓"',
            "test_each_wrong_number_of_a_seed_is_caught_by_plan_and_report",
        ),
    ),
    *_of(
        "data/gitignore.py",
        "tests/data/test_gitignore.py",
        (
            "the first pattern that matches decides",
            "for rule in reversed(rules):",
            "for rule in rules:",
            "test_patterns",
        ),
        (
            "a file comes back below a folder that is left out",
            "if above is None or (not start.startswith(place) and _matches(place, above)):",
            "if above is None:",
            "test_patterns",
        ),
        (
            "the nearest file is asked first and overruled",
            "for begin, rules in reversed(scopes):",
            "for begin, rules in scopes:",
            "test_the_nearest_file_decides_and_a_repository_begins_anew",
        ),
        (
            "** stands for one folder",
            'made += rb"(?:.*/)?"',
            'made += rb"(?:[^/]*/)?"',
            "test_patterns",
        ),
    ),
    *_of(
        "data/arrays.py",
        "tests/train/test_near_duplicates.py",
        (
            "a row that is like one before it is trained all the same",
            "and alike[number] != number:",
            "and alike[number] > number:",
            "test_the_first_of_those_alike_is_trained",
        ),
    ),
    *_of(
        "data/examples.py",
        "tests/train/test_near_duplicates.py",
        (
            "rows that were kept are taken from the cache for those without copies",
            'content |= {"near_duplicates": "drop"}',
            "pass",
            "test_the_first_of_those_alike_is_trained",
        ),
    ),
    *_of(
        "train/inputs/dataset.py",
        "tests/train/test_near_duplicates.py",
        (
            "valid rows are left out too",
            'near_duplicates=settings.near_duplicates if split == "train" else "keep",',
            "near_duplicates=settings.near_duplicates,",
            "test_rows_of_valid_and_test_are_kept_and_leaks_are_lint_s_to_tell",
        ),
    ),
    *_of(
        "data/duplicates.py",
        "tests/train/test_near_duplicates.py",
        (
            "a copy with another answer is a copy word for word",
            "whole = json.dumps([row.values.get(column) for column in columns], default=str)",
            "whole = json.dumps(row.values.get(columns[0]), default=str)",
            "test_the_first_of_those_alike_is_trained",
        ),
        (
            "a row of weight 0 takes its copies along",
            "if weight_field is not None and row_weight(row, weight_field) == 0:",
            "if False:",
            "test_a_row_of_weight_0_takes_no_copy_along",
        ),
    ),
    *_of(
        "train/survey.py",
        "tests/train/test_near_duplicates.py",
        (
            "copies are counted as rows to train where nothing is tokenised",
            'train -= counts["near_duplicates"]',
            "train -= 0",
            "test_the_plan_counts_them_with_a_tokenizer_or_without",
        ),
    ),
    *_of(
        "train/show_data.py",
        "tests/train/test_near_duplicates.py",
        (
            "what is left out as a copy is shown as trained",
            "if (first := first_alike.before(number, row)) is not None:",
            'if (first := first_alike.before(number, row)) == "":',
            "test_show_data_tells_what_each_is_like",
        ),
    ),
    *_of(
        "data/packed.py",
        "tests/data/test_packed.py",
        (
            "what is packed is read as it lies there",
            'if packing.endswith(".gz"):',
            'if packing.endswith(".gzip"):',
            "test_what_was_packed_is_read",
        ),
        (
            "a damaged file ends in a traceback",
            "except (OSError, EOFError, zlib.error) as error:",
            "except (OSError, zlib.error) as error:",
            "test_what_cannot_be_unpacked_is_said",
        ),
    ),
    *_of(
        "train/plan/rent.py",
        "tests/train/test_rent.py",
        (
            "a second card costs nothing",
            "[h * price * hired for h in hours]",
            "[h * price for h in hours]",
            "test_several_cards_cost_several_times_an_hour",
        ),
        (
            "every card is the first",
            "machine_elsewhere(config, card, None), world_size)",
            "machine_elsewhere(config, cards[0], None), world_size)",
            "test_time_is_work_over_peak_and_cost_is_time_times_price",
        ),
    ),
    *_of(
        "train/plan/fitting.py",
        "tests/train/test_fitting.py",
        (
            "a plan for one rank is refused for what many may not",
            "if ranks > world_size and may)",
            "if ranks > world_size)",
            "test_a_plan_for_one_rank_is_not_refused_for_what_many_may_not",
        ),
        (
            "a smaller micro-batch makes another step",
            'settings["train.gradient_accumulation_steps"] = steps',
            'settings["train.gradient_accumulation_steps"] = train.gradient_accumulation_steps',
            "test_a_way_that_is_named_is_one",
        ),
        (
            "a way that does not fit is named",
            "fit = [way for way in ways if way.needed <= there]",
            "fit = ways",
            "test_a_way_that_is_named_is_one",
        ),
        (
            "the slowest way is named",
            "same = [way for way in fit if not way.changes]",
            "same = [way for way in fit if not way.changes and way.slower > 1.5]",
            "test_the_fastest_way_is_taken_and_its_time_is_the_work_it_adds",
        ),
        (
            "a layer that is computed again costs no time",
            "computing = tokens * flops_per_token(config, sizes, policy)",
            'computing = tokens * flops_per_token(config, sizes, "none")',
            "test_the_fastest_way_is_taken_and_its_time_is_the_work_it_adds",
        ),
    ),
    *_of(
        "train/run.py",
        "tests/reliability/test_ranks.py",
        (
            "a program that is started again takes one of its runs for another",
            "World.from_environment(asked=asked)",
            "World.from_environment()",
            "test_a_program_s_runs_each_go_on_when_its_ranks_are_started_again",
        ),
    ),
    *_of(
        "train/run.py",
        "tests/train/test_device.py",
        (
            "every rank takes room on the first card",
            "    take_card(decide_device(config.train.device), world)\n",
            "",
            "test_a_rank_takes_its_own_card_before_it_asks_for_memory",
        ),
    ),
    *_of(
        "train/inputs/agreement.py",
        "tests/reliability/test_agreement.py",
        (
            "ranks with other rows train together",
            '        facts[f"what data.{name} holds"] = holds\n',
            "",
            "test_a_rank_that_would_do_another_run_is_refused[other-rows]",
        ),
        (
            "ranks with other settings train together",
            "        if own != first:",
            '        if own != first and "." not in name:',
            "test_a_rank_that_would_do_another_run_is_refused[learning-rate]",
        ),
        (
            "the base models of ranks are taken for alike by their size",
            "            parts.append(file.read(_SAMPLE_BYTES))\n",
            "",
            "test_a_rank_that_would_do_another_run_is_refused[base]",
        ),
        (
            "a node may not have its copies elsewhere",
            '"model.path", "train.output_dir",',
            '"train.output_dir",',
            "test_the_same_files_in_other_places_are_one_run",
        ),
    ),
    *_of(
        "train/process/world.py",
        "tests/train/test_world.py",
        (
            "several ranks train as if each were alone",
            "        if size <= 1:\n",
            "        if size <= 1024:\n",
            "test_torchrun_describes_the_ranks",
        ),
        (
            "what srun starts without torchrun trains once in each process",
            'environment.get(name, "1") not in',
            'environment.get(name, "1") in',
            "test_processes_that_another_launcher_started_are_no_runs",
        ),
        (
            "ranks hear what was said at a start before theirs",
            "    own, end, pause = uuid.uuid4().hex,",
            '    own, end, pause = f"{rank}",',
            "tests/reliability/test_ranks.py::test_ranks_meet_again_at_a_store_that_outlives_them",
        ),
        (
            "a rank that is gone is not named",
            'if not self._store.check([f"{key}/{n}"])]',
            'if self._store.check([f"{key}/{n}"])]',
            "tests/reliability/test_ranks.py::"
            "test_a_rank_that_is_killed_is_named_and_the_resumed_run_is_the_same_bit_for_bit",
        ),
        (
            "every rank tells the error that ended one",
            "        if first != word and isinstance(",
            "        if not first and isinstance(",
            "tests/reliability/test_ranks.py::test_a_full_disk_ends_all_ranks_with_one_message",
        ),
        (
            "every rank prints",
            "                if not self.first:\n                    nowhere",
            "                if self.first is None:\n                    nowhere",
            "tests/reliability/test_ranks.py::test_only_rank_0_prints",
        ),
    ),
    # --- ranks -----------------------------------------------------------------------------------
    *_of(
        "data/order.py",
        "tests/train/test_step_over_ranks.py",
        (
            "ranks take what lies next, however long it is",
            "key=lambda r: tokens[r])",
            "key=lambda r: r)",
            "test_shares_are_as_many_examples_as_the_plan_says_and_like_in_tokens",
        ),
    ),
    *_of(
        "train/step.py",
        "tests/train/test_step_over_ranks.py",
        (
            "a rank's loss is taken for the step's",
            "mean = world.sums(exact_sum(losses))[0] / targets",
            "mean = exact_sum(losses) / targets",
            "test_a_batch_has_one_loss_and_one_gradient_over_any_number_of_ranks",
        ),
        (
            "examples of a rank that is not at fault are named",
            "of=at_fault if known else batch",
            "of=at_fault or batch",
            "test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all",
        ),
    ),
    *_of(
        "train/evaluate.py",
        "tests/train/test_step_over_ranks.py",
        (
            "a rank's part is taken for the whole set",
            "loss, targets, right = world.sums(exact_sum(losses), targets, right)",
            "loss, targets = exact_sum(losses), float(targets)",
            "test_an_evaluation_over_ranks_is_the_token_mean_of_the_whole_set",
        ),
    ),
    *_of(
        "train/optim/buffers.py",
        "tests/train/test_step_over_ranks.py",
        (
            "replicas keep their own gradients",
            "        add(self.gradients)\n",
            "        add(self.gradients.clone())\n",
            "test_a_batch_has_one_loss_and_one_gradient_over_any_number_of_ranks",
        ),
    ),
    *_of(
        "train/inputs/sharding.py",
        "tests/reliability/test_ranks.py",
        (
            "gradients of a shared model are averaged, not added",
            "            module.set_gradient_divide_factor(1.0)\n",
            "",
            "test_ranks_that_share_every_weight_train_as_one_process",
        ),
    ),
    *_of(
        "train/saving/shares.py",
        "tests/reliability/test_ranks.py",
        (
            "what is still gathered behind an evaluation is saved as a rank's rows",
            "for name, source in sharing.sources.items()",
            "for name, source in run.model.named_parameters()",
            "test_ranks_that_share_every_weight_train_as_one_process",
        ),
    ),
    *_of(
        "files/tensors.py",
        "tests/reliability/test_shared_files.py",
        (
            "every rank writes its rows where the first ones belong",
            "offset += tensor.first * (sizes[name] // tensor.shape[0])",
            "offset += 0 * (sizes[name] // tensor.shape[0])",
            "test_a_rank_holds_its_share_and_one_tensor",
        ),
    ),
    *_of(
        "train/assemble.py",
        "tests/reliability/test_ranks.py",
        (
            "ranks that ran out of memory try the same again",
            "(how := do_less(run, single=is_single(run)))",
            "(how := str(is_single(run)))",
            "test_a_rank_of_a_shared_model_that_runs_out_of_memory_ends_all_and_they_go_on_with_half",
        ),
    ),
    *_of(
        "train/process/signals.py",
        "tests/train/test_signals.py",
        (
            "one signal that came twice ends a rank unsaved",
            "time.monotonic() - self._asked_at < self._apart",
            "time.monotonic() - self._asked_at < 0",
            "test_torchrun_passes_on_what_every_process_got_and_that_is_one_signal",
        ),
    ),
    # --- quantised weights -----------------------------------------------------------------------
    *_of(
        "kernels/quantised.py",
        "tests/kernels/test_quantised.py",
        (
            "of two numbers in a byte the first lies low",
            "codes[::2] << 4 | codes[1::2]",
            "codes[1::2] << 4 | codes[::2]",
            "test_nf4_has_the_bytes_of_bitsandbytes",
        ),
        (
            "a tie goes up",
            "torch.bucketize(scaled, middles, out_int32=True)",
            "torch.bucketize(scaled, middles, out_int32=True, right=True)",
            "test_a_tie_goes_down",
        ),
        (
            "the absmax are quantised again with their mean",
            "_dynamic(absmax.sub_(offset))",
            "_dynamic(absmax)",
            "test_nf4_has_the_bytes_of_bitsandbytes",
        ),
        (
            "numbers are rounded on their way",
            "target.copy_(values)",
            "target.copy_(values.bfloat16())",
            "test_nf4_has_the_bytes_of_bitsandbytes",
        ),
        (
            "a block of zeros is no number",
            "largest.clamp(min=_SMALLEST).reciprocal()",
            "largest.reciprocal()",
            "test_a_block_of_zeros_is_zeros_again",
        ),
        (
            "int8 is made of numbers that bitsandbytes does not see",
            "half = part.half()",
            "half = part",
            "test_int8_has_the_bytes_of_bitsandbytes",
        ),
        (
            "a model in bf16 takes the absmax along",
            "self._buffers[name] = moved if same else part.to(moved.device)",
            "self._buffers[name] = moved",
            "test_a_model_that_is_turned_into_another_type_leaves_the_parts_as_they_are",
        ),
    ),
    *_of(
        "kernels/linears.py",
        "tests/models/test_quantised_models.py",
        (
            "the dequantised weight is kept for the backward pass",
            "kept = weight.to(dtype) if isinstance(weight, Tensor) else None",
            "kept = dense(weight, dtype)",
            "test_what_is_kept_for_the_backward_pass_is_never_a_dequantised_weight",
        ),
    ),
    *_of(
        "kernels/triton/quantised.py",
        "tests/kernels/test_triton_quantised.py",
        (
            "of two numbers in a byte the first is written second",
            "tl.interleave(high, low)",
            "tl.interleave(low, high)",
            "test_dequantise",
        ),
        (
            "the absmax of the absmax is a neighbour's",
            "block // 256",
            "block // 128",
            "test_dequantise",
        ),
    ),
    *_of(
        "models/quantised.py",
        "tests/models/test_quantised_models.py",
        (
            "the head is quantised",
            "return is_weight and module.weight is not model.head_weight()",
            "return is_weight",
            "test_head_embedding_norms_and_biases_stay",
        ),
        (
            "int8 of what fp16 does not hold",
            'if kind == "int8" and not value.half().isfinite().all():',
            "if False:",
            "test_numbers_that_fp16_has_not_are_no_int8",
        ),
    ),
    *_of(
        "models/stored.py",
        "tests/models/test_quantised_models.py",
        (
            "absmax of a map of their own are read with the usual one",
            'if torch.equal(parts["nested_map"], dynamic_map(True)):',
            "if True:",
            "test_a_map_of_the_absmax_of_its_own_is_kept",
        ),
        (
            "a packed weight that is not there is looked into",
            'num_bytes if "packed" in taken else 0',
            "num_bytes",
            "test_parts_that_do_not_fit_are_refused",
        ),
        (
            "an offset beyond fp32 is taken",
            "abs(offset) <= torch.finfo(torch.float32).max",
            "True",
            "test_parts_that_do_not_fit_are_refused",
        ),
        (
            "a layout of old cards is read as rows",
            'f"{layer}weight_format"\n',
            'f"{layer}weight_form"\n',
            "test_parts_that_do_not_fit_are_refused",
        ),
        (
            "what a weight's shape is said to be is not compared",
            '{"shape": list(shape), "blocksize"',
            '{"blocksize"',
            "test_parts_that_do_not_fit_are_refused",
        ),
    ),
    *_of(
        "models/config.py",
        "tests/models/test_quantised_models.py",
        (
            "fp4 is read as nf4",
            'if kind != "nf4":',
            'if kind not in ("nf4", "fp4"):',
            "test_what_is_quantised_otherwise_is_refused",
        ),
    ),
    *_of(
        "lora/merging.py",
        "tests/train/test_quantization.py",
        (
            "an adapter is folded into packed bytes",
            "    _refuse_quantised(layers)\n",
            "",
            "test_folding_into_quantised_weights_is_refused",
        ),
    ),
    *_of(
        "lora/injection.py",
        "tests/train/test_quantization.py",
        (
            "quantised numbers are not counted",
            "_elements(parameters) + sum(map(math.prod, quantised))",
            "_elements(parameters)",
            "test_a_run_says_what_its_base_is",
        ),
    ),
    *_of(
        "train/plan/sizes.py",
        "tests/train/test_quantization.py",
        (
            "the weight that is a tensor for a moment is not planned",
            "sum(parts) + largest * compute + piece",
            "sum(parts)",
            "test_memory_that_was_planned_is_what_a_step_takes",
            "test_ledger_of_quantised_weights",
        ),
    ),
    *_of(
        "train/plan/decide.py",
        "tests/train/test_quantization.py",
        (
            "ranks share quantised weights where they do not fit",
            "if config.model.quantization is not None or config.model.stream_layers",
            "if config.model.stream_layers",
            "test_ranks_have_quantised_weights_whole",
        ),
    ),
    *_of(
        "train/inputs/base_model.py",
        "tests/train/test_quantization.py",
        (
            "what the folder's weights are is not written down",
            "    if stored is None or config.model.random_init:\n",
            "    if True:\n",
            "test_a_base_that_lies_quantised_is_trained_as_it_is",
        ),
    ),
    *_of(
        "train/evaluation/confined.py",
        "tests/train/test_programs.py",
        (
            "the token is said before the program has come to its end",
            "    try:\n        exec(",
            "    write(answer_file, read(token_file, 2**10))\n    try:\n        exec(",
            "test_right_programs_pass_and_wrong_ones_do_not_whatever_they_try",
        ),
        (
            "a program writes wherever it likes",
            "        return text == null or text.startswith(inside)\n",
            "        return True\n",
            "test_nothing_outside_its_own_folder_is_written_moved_or_removed",
        ),
        (
            "a program writes any number of files",
            "                left -= 1\n",
            "                left -= 0\n",
            "test_more_small_files_than_are_allowed_are_refused",
        ),
        (
            "the kernel is not asked to refuse anything",
            "    if kernel_refuses():\n        libc",
            "    if False:\n        libc",
            "test_the_kernel_refuses_what_goes_past_python",
        ),
    ),
    *_of(
        "train/evaluation/programs.py",
        "tests/train/test_programs.py",
        (
            "a program that leaves with 0 before its tests has passed",
            "    if code == 0 and said == token:\n",
            "    if code == 0:\n",
            "test_right_programs_pass_and_wrong_ones_do_not_whatever_they_try",
        ),
        (
            "a program sees the secrets of our environment",
            "env=_environment(folder),",
            "env={**os.environ},",
            "test_its_folder_goes_and_none_of_our_environment_comes",
        ),
    ),
    *_of(
        "train/evaluation/problems.py",
        "tests/train/test_programs.py",
        (
            "pass@k is the naive power",
            "        missed *= 1 - k / i\n",
            "        missed = (1 - passed / samples) ** k\n",
            "test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one",
        ),
    ),
    *_of(
        "train/evaluation/likelihood.py",
        "tests/train/test_likelihood.py",
        (
            "a mean over tokens is one over rows",
            "    value = by_row.sum() / total\n",
            "    value = (by_row / counted).mean()\n",
            "test_an_error_is_the_sandwich_of_an_intercept_clustered_by_row",
        ),
        (
            "tokens of one row count as independent",
            "    _, which = np.unique(np.asarray(rows), return_inverse=True)\n",
            "    which = np.arange(len(rows))\n",
            "test_an_error_is_the_sandwich_of_an_intercept_clustered_by_row",
        ),
        (
            "losses are given to the wrong examples",
            "sums[some] = np.bincount(",
            "sums[np.sort(some)] = np.bincount(",
            "test_loss_and_accuracy_of_each_row_are_transformers",
        ),
    ),
    *_of(
        "train/generation/decode.py",
        "tests/train/test_completions.py",
        (
            "every document of a batch stands at the longest one's position",
            "positions = past.lengths.clone()\n",
            "positions = past.lengths * 0 + past.length\n",
            "test_greedy_batches_equal_transformers",
        ),
        (
            "who has ended stays in the cache",
            "            past.keep(staying)\n",
            "            past.keep(range(len(staying)))\n",
            "test_greedy_batches_equal_transformers",
        ),
        (
            "a batch's logits are those of other documents' last tokens",
            "        last = torch.tensor(lengths).cumsum(0) - 1\n",
            "        last = torch.tensor(lengths).sort()[0].cumsum(0) - 1\n",
            "test_greedy_batches_equal_transformers",
        ),
        (
            "all samples of a row are drawn alike",
            "        for number in self.key:\n",
            "        for number in self.key[:1]:\n",
            "test_draws_are_those_of_the_row_and_sample_whatever_the_batch",
        ),
    ),
    *_of(
        "train/generation/decode.py",
        "tests/train/test_cached_generation.py",
        (
            "what a cache remembers of a chat is forgotten",
            "        past = cache or KeyValueCache(capacity)\n",
            "        past = KeyValueCache(capacity)\n",
            "test_it_writes_what_is_written_without",
        ),
    ),
    *_of(
        "kernels/attention.py",
        "tests/train/test_cached_generation.py",
        (
            "a document that is written on alone sees one key beyond its window",
            "keys[:, -window:], values[:, -window:]",
            "keys[:, -window - 1 :], values[:, -window - 1 :]",
            "test_it_writes_what_is_written_without",
        ),
    ),
    *_of(
        "models/cache.py",
        "tests/train/test_cached_generation.py",
        (
            "more room for a cache is empty room",
            "= (x[: self.length] for x in held)\n",
            "= (0 * x[: self.length] for x in held)\n",
            "test_it_writes_what_is_written_without",
        ),
        (
            "the beginnings of a batch all stand in the first document's rows",
            "        return (starts[:, None] + place)[place < self.lengths[:, None]]\n",
            "        return (0 * starts[:, None] + place)[place < self.lengths[:, None]]\n",
            "test_it_writes_what_is_written_without",
        ),
    ),
    *_of(
        "kernels/reference.py",
        "tests/train/test_generate.py",
        (
            "without gradients queries and keys turn the other way",
            "torch.cat((-high, low), -1), sin[:, None]",
            "torch.cat((high, -low), -1), sin[:, None] * 2",
            "test_greedy_equals_transformers",
        ),
    ),
    *_of(
        "train/generation/sampling.py",
        "tests/train/test_sampling.py",
        (
            "top-p is taken before top-k",
            "    if 0 < sampling.top_k < len(scores):\n",
            "    if 0 < sampling.top_k < len(scores) and sampling.top_p == 1:\n",
            "test_top_k_and_top_p_are_transformers",
        ),
        (
            "of those as likely as the last of top-k one stays",
            "scores[scores < scores.topk(sampling.top_k).values[-1]] = -math.inf",
            "scores[scores.argsort(descending=True)[sampling.top_k :]] = -math.inf",
            "test_those_as_likely_as_the_last_of_top_k_stay",
        ),
    ),
    *_of(
        "train/generation/stream.py",
        "tests/train/test_text_stream.py",
        (
            "half a character is shown",
            "        if text.endswith(_NOT_WHOLE):\n",
            "        if False:\n",
            "test_characters_come_whole_and_as_soon_as_they_are",
        ),
        (
            "the bytes of a run are shown before its end",
            "        if self._amid_bytes:\n            return",
            "        if False:\n            return",
            "test_bytes_of_a_character_after_which_one_too_many_comes_are_held",
        ),
        (
            "a token without a text ends a run of bytes",
            "not self._decode(ids[-1:])",
            "False",
            "test_any_tokens_give_their_whole_text",
        ),
        (
            "the window moves behind spaces, which a text does not begin with",
            "        if piece.strip():",
            "        if True:",
            "test_any_tokens_give_their_whole_text",
        ),
    ),
    *_of(
        "train/generation/rows.py",
        "tests/train/test_generate_rows.py",
        (
            "an adapter's base is nobody's weights",
            "{loaded.source, loaded.trained}",
            "{loaded.trained}",
            "test_what_was_done_over_another_base_is_not_taken",
        ),
        (
            "rows are drawn alike",
            "Asked(ids, (row,)) for row",
            "Asked(ids, (0,)) for row",
            "test_each_row_is_completed_as_alone",
        ),
        (
            "what was kept is not read",
            '        return {one["row"]: one["ids"] for one in found}\n',
            "        return {}\n",
            "test_a_command_that_was_stopped_goes_on_where_it_was",
        ),
        (
            "completions of other settings are taken over",
            '!= {"of": self._fingerprint}',
            "== {}",
            "test_a_command_that_was_stopped_goes_on_where_it_was",
        ),
        (
            "a column of the rows is overwritten",
            "        if column in row.values:\n",
            "        if False:\n",
            "test_bad_rows_are_one_sentence",
        ),
    ),
    *_of(
        "train/generation/chat.py",
        "tests/train/test_chat_command.py",
        (
            "a changed history is not fed again",
            "        return min(common_prefix(prompt, self._known), len(prompt) - 1)\n",
            "        return min(len(self._known), len(prompt) - 1)\n",
            "test_a_template_that_changes_what_was_said_is_fed_again",
        ),
        (
            "keys with the frequencies of another length are kept",
            'self._loaded.model.config.rope.rope_type == "dynamic"',
            "False",
            "test_frequencies_of_the_length_are_fed_again",
        ),
        (
            "a turn that did not fit stays in the history",
            '        turns = [*self.messages, {"role": "user", "content": text}]\n',
            '        self.messages.append({"role": "user", "content": text})\n'
            "        turns = self.messages\n",
            "test_the_end_of_the_context_is_said_and_the_chat_goes_on",
        ),
    ),
    *_of(
        "train/generation/loaded.py",
        "tests/train/test_runs_with_holes.py",
        (
            "a run on holes does not know what ends one",
            "        stop_ids |= {FimTokens(tokenizer).end_id}\n",
            "        pass\n",
            "test_what_is_completed_ends_where_a_hole_ends",
        ),
    ),
    *_of(
        "train/generation/command.py",
        "tests/train/test_generate.py",
        (
            "both completions of a comparison are the adapter's",
            "adapted=not options.compare",
            "adapted=True",
            "test_with_and_without_the_adapter_stand_side_by_side",
        ),
    ),
    *_of(
        "train/evaluation/__main__.py",
        "tests/train/test_evaluate_command.py",
        (
            "a model's programs run without anybody's leave",
            "        if not options.run_code:\n",
            "        if False:\n",
            "test_what_cannot_be_is_refused_in_one_sentence",
        ),
    ),
    *_of(
        "train/evaluation/command.py",
        "tests/train/test_evaluate_command.py",
        (
            "completed rows are the first ones",
            "tasks_of_examples(examples, tokenizer, most)",
            "tasks_of_examples(examples, tokenizer, len(examples))[:most]",
            "test_completed_rows_are_spread_evenly_and_cut_ones_left_out",
        ),
    ),
    *_of(
        "train/plan/rent.py",
        "tests/train/test_rent.py",
        (
            "any run on a card is a measure of this one",
            "like = [one for one in there if one.facts == facts]",
            "like = there",
            "test_a_like_run_on_the_card_takes_the_place_of_the_prediction",
        ),
    ),
    *_of(
        "train/report/speeds.py",
        "tests/train/test_rent.py",
        (
            "a run's first steps, which compile and warm up, count for its speed",
            "record.train[STEPS_BEFORE:]",
            "record.train",
            "test_a_like_run_on_the_card_takes_the_place_of_the_prediction",
        ),
    ),
    *_of(
        "train/evaluation/rated.py",
        "tests/train/test_rated.py",
        (
            "ranks cut batches of their own, which round otherwise",
            "at // AT_ONCE % world.size == world.rank",
            "at % world.size == world.rank",
            "test_over_ranks_they_are_the_same_numbers",
        ),
        (
            "a rank counts its own completions alone",
            "told = iter(world.sums(*given))",
            "told = iter(given)",
            "test_over_ranks_they_are_the_same_numbers",
        ),
        (
            "a completion does not end where the model ends it",
            "Sampling(run.config.eval.max_new_tokens, stop_ids)",
            "Sampling(run.config.eval.max_new_tokens)",
            "test_over_ranks_they_are_the_same_numbers",
        ),
        (
            "a loss that is not finite ends the run in a completion",
            "    if not math.isfinite(result.loss):  # a text of such numbers is none\n",
            "    if False:\n",
            "test_over_ranks_they_are_the_same_numbers",
        ),
        (
            "the first rows without tests are found by the first evaluation",
            "        if examples is not None:\n            check_room(",
            "        if False:\n            check_room(",
            "test_what_cannot_be_measured_is_refused_before_weights_are_read",
        ),
    ),
    *_of(
        "train/finish.py",
        "tests/train/test_rated.py",
        (
            "a model's programs run in a training without a word",
            '    if "pass@1" in (config.eval.metrics or ()):\n',
            "    if False:\n",
            "test_programs_that_pass_decide_the_best_and_the_end_and_are_warned_of",
        ),
    ),
    *_of(
        "train/evaluation/receipt.py",
        "tests/train/test_merge.py",
        (
            "a receipt is made in the precision of the weights",
            "        parameter.data = data.float()\n",
            "        parameter.data = data.clone()\n",
            "test_the_receipt_is_what_peft_and_transformers_say",
        ),
        (
            "a comparison leaves the model in fp32",
            "    finally:\n        for parameter, data in kept:\n"
            "            parameter.data = data\n",
            "    finally:\n        pass\n",
            "test_comparing_leaves_a_model_as_it_was_and_takes_whole_rows",
        ),
    ),
    *_of(
        "train/merge/fold.py",
        "tests/train/test_merge.py",
        (
            "the tolerance is one of the loss",
            "    if not found.largest_logit_difference <= tolerance:\n",
            "    if not found.loss_difference <= tolerance:\n",
            "test_beyond_the_tolerance_nothing_is_left",
        ),
    ),
    *_of(
        "train/state.py",
        "tests/train/test_eval_metrics.py",
        (
            "the lowest accuracy is the best",
            "        return value if metric in LOWER_IS_BETTER else 1 - value\n",
            "        return value\n",
            "test_a_run_records_them_and_keeps_and_stops_by_the_one_that_is_named",
        ),
    ),
    *_of(
        "train/report/record.py",
        "tests/train/test_report.py",
        (
            "a killed run is running for ever",
            "    _tell_interrupted(folder",
            "    (folder",
            "test_a_run_whose_process_is_gone_is_not_running",
        ),
        (
            "a run that runs is interrupted",
            "is_locked(folder) is False",
            "is_locked(folder) is not None",
            "test_a_run_whose_process_is_gone_is_not_running",
        ),
    ),
    *_of(
        "train/report/record.py",
        "tests/train/test_eval_metrics.py",
        (
            "the report takes the lowest loss for the best, whatever the run went by",
            'metric = self.section("eval").get("best_metric") or "loss"',
            'metric = "loss"',
            "test_a_run_records_them_and_keeps_and_stops_by_the_one_that_is_named",
        ),
    ),
    *_of(
        "train/report/evaluated.py",
        "tests/train/test_evaluate_command.py",
        (
            "the report has the oldest evaluation, and again every newer one",
            """document["split"], str(about)] = document""",
            """document["split"], str(len(newest))] = document""",
            "test_of_a_run_it_is_the_run_s_own_test_loss_and_stands_in_its_report",
        ),
    ),
    *_of(
        "train/process/command.py",
        "tests/train/test_command.py",
        (
            "every rank does the whole of a command",
            "        if not over_ranks:\n",
            "        if over_ranks:\n",
            "test_what_one_process_does_is_not_done_by_every_rank",
        ),
    ),
    *_of(
        "kernels/attention.py",
        "tests/train/test_completions.py",
        (
            "a document that is written on in a batch sees one key beyond its window",
            "        visible &= row > positions[:, None] - window\n",
            "        visible &= row >= positions[:, None] - window\n",
            "test_greedy_batches_equal_transformers",
        ),
    ),
    *_of(
        "train/merge/fold.py",
        "tests/train/test_quantization.py",
        (
            "which weights were merged is not said",
            "    elif trained_over := _trained_over(adapter):\n",
            "    elif trained_over := None:\n",
            "test_merging_takes_the_original_weights_and_says_so",
        ),
    ),
    *_of(
        "train/config/spellings.py",
        "tests/train/test_spellings.py",
        (
            "load_in_4bit=true means nothing",
            "return {key: word} if value is True else {}",
            "return {}",
            "test_what_is_certain_is_taken_and_said",
        ),
    ),
    *_of(
        "train/saving/artifact.py",
        "tests/train/test_command.py",
        (
            "a folder that is not there is looked for with torch",
            "    if not run_or_adapter.is_dir():\n",
            "    if False:\n",
            "test_what_is_cheap_to_answer_does_not_wait_for_torch",
        ),
    ),
    *_of(
        "train/inputs/dataset.py",
        "tests/train/test_prepare.py",
        (
            "any column called split is noted",
            "named.lower() in SPLIT_NAMES",
            "named",
            "test_a_column_of_splits_that_nobody_reads_is_noted",
        ),
    ),
    *_of(
        "train/process/progress.py",
        "tests/train/test_evaluate_command.py",
        (
            "a log is filled with lines",
            "time.monotonic() - said >= SECONDS_BETWEEN_LINES",
            "True",
            "test_in_a_log_a_line_now_and_then_says_how_far_it_is",
        ),
    ),
    *_of(
        "train/config/completion.py",
        "tests/train/test_described.py",
        (
            "an evaluation is offered every key",
            'if "section" in sections or key.split(".")[0] in sections',
            "if sections",
            "test_bash_offers_each_command_s_own_options_and_what_they_take",
        ),
    ),
    # --- what follows a run ----------------------------------------------------------------------
    *_of(
        "files/folders.py",
        "tests/train/test_card.py",
        (
            "a card of the user's goes with the folder that is written anew",
            "        if (target / CARD).is_file():\n",
            "        if False:\n",
            "test_a_card_that_was_changed_is_the_user_s",
        ),
        (
            "a card makes a whole folder a damaged one",
            "- {MANIFEST, CARD}",
            "- {MANIFEST}",
            "test_peft_and_transformers_load_the_folder_as_its_card_says",
        ),
    ),
    *_of(
        "train/config/json_schema.py",
        "tests/train/test_described.py",
        (
            "an exclusive bound is an inclusive one",
            '("exclusiveMaximum", rule.below)',
            '("maximum", rule.below)',
            "test_the_schema_takes_what_a_file_may_hold",
        ),
        (
            "what the stack calls a value is none",
            "[*rule.words, *(alias",
            "[*rule.words, *(alias.upper()",
            "test_the_schema_takes_what_a_file_may_hold",
        ),
    ),
    *_of(
        "train/config/completion.py",
        "tests/train/test_described.py",
        (
            "a bare key is not completed",
            "    return [key.path, *([key.name] if alone else [])]\n",
            "    return [key.path]\n",
            "test_bash_offers_commands_options_keys_and_their_words",
        ),
        (
            "no file is offered where one is named",
            "compgen -f -P ",
            "compgen -d -P ",
            "test_bash_offers_commands_options_keys_and_their_words",
        ),
    ),
    *_of(
        "train/log/step_trace.py",
        "tests/train/test_step_trace.py",
        (
            "a run that is stopped loses the trace that it began",
            "        profiler.stop()\n        if not self._done:\n",
            "        profiler.stop()\n        if len(self._done) < len(self._steps):\n",
            "test_a_run_that_is_stopped_between_them_leaves_what_was_done_and_goes_on",
        ),
        (
            "the trace goes on beyond its last step",
            "        if step == self._steps[-1]:\n",
            "        if step > self._steps[-1]:\n",
            "test_the_trace_holds_those_steps_and_the_run_is_the_same",
        ),
    ),
    *_of(
        "train/log/records.py",
        "tests/train/test_step_trace.py",
        (
            "every rank writes a trace of its own, all into one file",
            "traced = run.plan.profile_steps if run.world.first else range(0)",
            "traced = run.plan.profile_steps",
            "test_of_many_ranks_the_first_alone_is_traced",
        ),
    ),
    *_of(
        "train/plan/profiled.py",
        "tests/train/test_step_trace.py",
        (
            "the last step is left out",
            "    return range(first, last + 1)\n",
            "    return range(first, last)\n",
            "test_the_steps_that_are_asked_for",
        ),
        (
            "steps that the run has not are traced in silence",
            "    if total_steps is not None and last > total_steps:\n",
            "    if total_steps is not None and first > total_steps:\n",
            "test_steps_that_the_run_has_not_are_refused",
        ),
    ),
    *_of(
        "train/publish/export_metrics.py",
        "tests/train/test_export_metrics.py",
        (
            "a tracker is left open",
            "    finally:\n        trackio.finish()\n",
            "    finally:\n        pass\n",
            "test_a_tracker_gets_every_step_in_order",
        ),
        (
            "the test loss stands in the place of the valid loss",
            'EVAL_TAGS[row["split"]].split("/")[0]',
            '"eval"',
            "test_a_csv_has_a_line_a_step",
        ),
        (
            "a file of the user's is written over",
            "        if options.out.exists():\n",
            "        if False:\n",
            "test_a_csv_has_a_line_a_step",
        ),
    ),
    *_of(
        "train/publish/push.py",
        "tests/train/test_push.py",
        (
            "what is to be private goes where everybody sees it",
            "        if private and not hidden:\n",
            "        if False:\n",
            "test_a_run_is_pushed_where_it_is_told_and_only_there",
        ),
        (
            "a repository that is to be private is made public",
            "private=True if private else None",
            "private=None",
            "test_a_run_is_pushed_where_it_is_told_and_only_there",
        ),
        (
            "a card of theirs on the Hub is written over",
            "        return not is_ours(Path(",
            "        return False and not is_ours(Path(",
            "test_a_run_is_pushed_where_it_is_told_and_only_there",
        ),
        (
            "a damaged folder is pushed",
            "    if (problem := damage(final)) is not None:\n",
            "    if (problem := damage(final)) is None:\n        pass\n    elif False:\n",
            "test_what_cannot_be_pushed_is_refused_in_one_sentence",
        ),
        (
            "the Hub is asked without a token",
            "    if get_token() is None:\n",
            "    if False:\n",
            "test_without_a_token_nobody_is_asked",
        ),
    ),
    *_of(
        "train/report/card.py",
        "tests/train/test_card.py",
        (
            "a card that somebody changed is written over",
            "    if path.exists() and not is_ours(path):\n",
            "    if False:\n",
            "test_a_card_that_was_changed_is_the_user_s",
        ),
        (
            "a folder of this machine is named as a base that the Hub knows",
            "        base_model=base if known else None,\n",
            "        base_model=base,\n",
            "test_a_folder_is_no_base_that_the_hub_knows",
        ),
        (
            "the file's title rules over what the base's card says",
            "    if card is not None:\n",
            '    if card is not None and find("LICENSE") is None:\n',
            "test_a_licence_is_read_and_never_invented",
        ),
        (
            "the losses are those of the last evaluation, whatever final/ holds",
            'if row["step"] == step and row["loss"] is not None]\n    # The test',
            'if row["loss"] is not None]\n    # The test',
            "test_losses_are_those_of_the_weights_in_final",
        ),
        (
            "rows are named with the folders they lie in",
            "or Path(spec).name}",
            "or spec}",
            "test_a_folder_is_no_base_that_the_hub_knows",
        ),
    ),
    *_of(
        "train/report/compare.py",
        "tests/train/test_compare.py",
        (
            "losses over other rows are compared",
            "    elif len(targets) > 1:\n",
            "    elif len(targets) > 2:\n",
            "test_losses_over_other_rows_are_not_compared",
        ),
        (
            "the highest loss wins",
            'key=lambda one: one[1]["loss"])',
            'key=lambda one: -one[1]["loss"])',
            "test_the_lowest_loss_wins_where_the_rows_are_the_same",
        ),
        (
            "a key that an older run does not know differs from its default",
            '"preset": record.config.get("preset"), **defaults}',
            '"preset": record.config.get("preset")}',
            "test_only_what_differs_is_listed_with_what_surrounds_the_run",
        ),
        (
            "a file of the user's is written over",
            "    if not ours and (",
            "    if False and (",
            "test_the_text_and_the_picture_are_written_and_nothing_of_the_user_s_is",
        ),
    ),
    *_of(
        "train/report/costs.py",
        "tests/train/test_report.py",
        (
            "the operations of all ranks are one rank's",
            "        predicted = flops / ranks / (",
            "        predicted = flops / (",
            "test_predicted_against_measured_on_a_card",
        ),
        (
            "a card is known by a part of its name",
            'if set(name.split("-")) <= set(words)]',
            'if any(word.startswith(name.split("-")[0]) for word in words)]',
            "test_the_card_is_known_by_its_device_s_name",
        ),
        (
            "what is predicted is for all steps, whatever was done",
            "    done = record.step / record.total_steps if",
            "    done = 1.0 if",
            "test_predicted_against_measured_on_a_card",
        ),
    ),
    *_of(
        "train/report/notes.py",
        "tests/train/test_report.py",
        (
            "the train loss is compared with where it began",
            "    low = min(range(TENTHS), key=means.__getitem__)\n",
            "    low = TENTHS - 1\n",
            "test_a_train_loss_that_ends_above_its_lowest_has_diverged",
        ),
        (
            "one wild step is called unstable",
            "    if len(far) > max(1, OFTEN_FAR * len(norms)):\n",
            "    if len(far) > 0:\n",
            "test_wild_gradient_norms_are_told_with_their_share",
        ),
        (
            "a run that goes on is told that it never reached its peak",
            'record.status.get("state") not in ("finished", "failed"):\n        return\n    top',
            'record.status.get("state") is None:\n        return\n    top',
            "test_a_peak_that_was_never_reached_and_too_few_steps_are_told",
        ),
    ),
]


def _python_environment(copy: Path) -> dict[str, str]:
    """Return the environment in which tests see the copy and nothing of the checkout."""
    return {
        **os.environ,
        "PYTHONPATH": str(copy),
        # A mutated file may have the size and the second of the one before it.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "1000",  # else pytest cuts off what a test failed with
        "TMPDIR": str(copy.parent),
    }


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Copy what tests need to a temporary folder, and delete it at the end."""
    with tempfile.TemporaryDirectory(prefix="lathe-mutations-") as folder:
        copy = Path(folder) / "tree"
        left_out = shutil.ignore_patterns("__pycache__", ".*", "runs", "shared", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=left_out)
        yield copy


def _pytest(copy: Path, tests: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    options = ["-x", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
    for chosen in ("not gpu and not slow", "not gpu"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-m", chosen, *tests],
            cwd=copy,
            env=_python_environment(copy),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode != _NONE_CHOSEN:  # the tests are slow, all of them
            break
    return done


def try_out(mutation: Mutation, copy: Path) -> Outcome:
    """Put one mutation into a copy of the tree, run its tests there, and take it out again."""
    started = time.monotonic()
    path = copy / mutation.path
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutation.old) != 1:
        return Outcome(mutation, "gone", "its text is not in the file exactly once", 0.0)
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        done = _pytest(copy, mutation.tests, _SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome(
            mutation, "broken", f"not done after {_SECONDS} s", time.monotonic() - started
        )
    finally:
        path.write_text(text, encoding="utf-8")
    words = next(
        (line for line in reversed(done.stdout.splitlines()) if line.startswith("FAILED")),
        (done.stdout + done.stderr).strip()[-300:],
    )
    if done.returncode == 0:
        result = "survived"
    elif done.returncode == 1 and words.startswith("FAILED") and not _NONSENSE.search(words):
        result = "red"
    else:
        result = "broken"
    return Outcome(mutation, result, words, time.monotonic() - started)


def check_that_all_pass(mutations: Sequence[Mutation]) -> None:
    """Run the tests of all mutations on a copy without any.

    Raises:
        RuntimeError: A test fails by itself, so that its failing would say nothing.
    """
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    with copied_tree() as copy:
        done = _pytest(copy, tests, 10 * _SECONDS)
    if done.returncode != 0:
        raise RuntimeError(
            f"without a mutation, already:\n{done.stdout[-3000:]}{done.stderr[-500:]}"
        )


def run(
    mutations: Sequence[Mutation], say: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Try mutations out, some at a time; `say` is called with each outcome as it comes."""
    copies: Queue[Path] = Queue()

    def one(mutation: Mutation) -> Outcome:
        copy = copies.get()
        try:
            outcome = try_out(mutation, copy)
        finally:
            copies.put(copy)
        say(outcome)
        return outcome

    with copied_tree() as first, copied_tree() as second, ThreadPoolExecutor(AT_ONCE) as pool:
        for copy in (first, second):
            copies.put(copy)
        return list(pool.map(one, mutations))


def table(outcomes: Sequence[Outcome]) -> str:
    """Return counts by folder, and every mutation that is not red."""
    results = ("red", "survived", "broken", "gone")
    lines = [f"{'':10}" + "".join(f"{result:>10}" for result in results)]
    for folder in (*FOLDERS, "all"):
        counts = Counter(
            o.result for o in outcomes if folder == "all" or o.mutation.path.startswith(folder)
        )
        lines.append(f"{folder:10}" + "".join(f"{counts[result]:>10}" for result in results))
    for outcome in outcomes:
        if outcome.result != "red":
            one = outcome.mutation
            lines.append(f"{outcome.result}: {one.path}: {one.why} ({', '.join(one.tests)})")
            lines.append(f"    {outcome.words}")
    return "\n".join(lines)


def main(paths: Sequence[str]) -> int:
    """Try out the mutations of the files named, all where none is; 0 where all are red."""
    unknown = set(paths) - {mutation.path for mutation in MUTATIONS}
    if unknown:
        print(f"no mutation is of {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [mutation for mutation in MUTATIONS if not paths or mutation.path in paths]

    def say(outcome: Outcome) -> None:
        mutation = outcome.mutation
        print(
            f"{outcome.result:9}{outcome.seconds:5.1f} s  {mutation.path}: {mutation.why}",
            flush=True,
        )

    check_that_all_pass(chosen)
    outcomes = run(chosen, say)
    print(table(outcomes))
    return 0 if all(outcome.result == "red" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
