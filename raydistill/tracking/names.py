"""The one list of metric names. Code, dashboards and comparisons take them from here."""

import difflib
import fnmatch
import re
from collections.abc import Iterable

METRICS: dict[str, str] = {
    # losses, each the mean over the batch of one optimiser update
    "loss/dm": "generator: distribution-matching surrogate; its gradient is the normalised score difference",
    "loss/sid": "generator: score identity loss, sum over a sample's elements, times method.generator_loss_scale",
    "loss/regression": "generator: squared distance to the teacher's own sample from the same noise (warm-up)",
    "loss/gan_generator": "generator: non-saturating GAN loss on generated samples",
    "loss/moment": "generator: product of samples and moment gap; its value is no distance, its gradient is the gap",
    "loss/generator_total": "generator: weighted sum that is differentiated",
    "loss/dsm": "critic: denoising score matching on generated samples",
    "loss/teacher": "critic: weighted squared distance to the teacher's x0 on noised generated samples",
    "loss/gan_critic": "critic: GAN classification loss on real and generated samples",
    "loss/critic_total": "critic: weighted sum that is differentiated",
    # gradient norms (L2), before clipping
    "grad_norm/dm": "gradient of the distribution-matching term at the generated samples of the global batch",
    "grad_norm/regression": "gradient of the regression term at the generated samples of the global batch",
    "grad_norm/sid": "gradient of the score identity term at the generated samples of the global batch",
    "grad_norm/moment": "gradient of the moment-matching term at the generated samples of the global batch",
    "grad_norm/gan_generator": "gradient of the GAN term at the generated samples of the global batch",
    "grad_norm/generator": "whole gradient of the generator's weights",
    "grad_norm/critic": "whole gradient of the critic's weights",
    # is the critic keeping up?
    "critic/real_accuracy": "share of real samples that the GAN head takes for real",
    "critic/fake_accuracy": "share of generated samples that the GAN head takes for generated",
    "critic/lag": "teacher-critic disagreement: mean |x0_teacher - x0_critic| on noised generated samples",
    # generated samples, in the space the generator works in
    "sample/mean": "mean of the generated samples; a drift is a brightness drift",
    "sample/std": "standard deviation of the generated samples; a rise is over-saturation, a fall collapse",
    "sample/absmax": "largest absolute value in the generated samples",
    # optimiser
    "lr/generator": "learning rate of the generator",
    "lr/critic": "learning rate of the critic",
    "clipped_steps/generator": "optimiser steps so far whose gradient was scaled down to generator.clip_norm",
    "clipped_steps/critic": "optimiser steps so far whose gradient was scaled down to critic.clip_norm",
    # counters: the x-axis of every comparison is one of them
    "generator_updates": "optimiser steps of the generator",
    "critic_updates": "optimiser steps of the critic",
    "images": "samples generated for training",
    "target_updates": "optimiser steps of the generator that the run is to make (train.generator_updates)",
    "restarts": "times that training began again since the run first began",
    # cost
    "time/train_s": "seconds spent in updates so far, over restarts",
    "time/update_s": "seconds for one generator update with its critic updates",
    "time/data_s": "seconds of it spent waiting for data",
    "time/teacher_wait_s": "seconds of it spent waiting for teachers that live elsewhere",
    "time/critic_wait_s": "seconds of it that generator ranks spent waiting for the critic's answers",
    "time/generator_s": "seconds of it that generator ranks did not wait for the critic",
    "time/critic_s": "seconds of a window of the critic's own ranks, waiting included",
    "throughput/images_per_s": "training samples per second, all ranks together",
    "memory/peak_gib": "peak memory of rank 0 in GiB since its process began",
    "traffic/teacher_bytes": "bytes of queries and answers between rank 0 and the teacher pool in one update",
    "traffic/critic_bytes": "bytes between rank 0 and the critic's ranks in one update",
    # the machine that rank 0 trains on, under the names of MLflow's own tab for it
    "system/cpu_utilization_percentage": "mean over the node's cores since the point before",
    "system/system_memory_usage_megabytes": "memory of the node in use, in units of 10^6 bytes",
    "system/system_memory_usage_percentage": "the same, of all its memory",
    "system/gpu_*_memory_usage_megabytes": "memory of rank 0's GPU in use, in units of 10^6 bytes",
    "system/gpu_*_memory_usage_percentage": "the same, of all its memory",
    "system/gpu_*_utilization_percentage": "share of time in which rank 0's GPU worked (needs nvidia-ml-py)",
    # roles apart
    "teacher/replicas": "teacher replicas that queries go to",
    "teacher/queue": "queries of all ranks that were out at a time, the most within a second",
    "teacher/latency_s": "seconds from the sending of a query to its answer in the replica, waiting there included",
    "teacher/retries": "queries repeated so far because a replica died or was slow",
    "version/generator": "generator updates done when the critic's last answers were given",
    "version/critic": "critic updates done by then; with max_staleness=1 up to R fewer than R times the above",
    # preflight: the teacher denoises real training samples before step 1
    "preflight/error_*": "relative error of the teacher's x0 at one noise level",
    # evaluation, at the step of the evaluated snapshot; N is part of the name
    "eval/toyfid_*": "generator: Frechet distance in the detector's features, over N samples",
    "eval/teacher_toyfid_*": "teacher: the same protocol with its own sampler",
    "eval/toykid_*": "generator: kernel distance in the detector's features, over N samples; unbiased",
    "eval/teacher_toykid_*": "teacher: the same",
    "eval/prompt_accuracy_*": "generator: share of N samples that show every object their caption names",
    "eval/teacher_prompt_accuracy_*": "teacher: the same",
    "eval/label_accuracy_*": "generator: share of N samples that the detector takes for the digit of their caption",
    "eval/teacher_label_accuracy_*": "teacher: the same",
    # published protocols (evaluator.protocol)
    "eval/fid_*": "generator: Frechet inception distance by a published protocol, over N samples",
    "eval/teacher_fid_*": "teacher: the same protocol with its own sampler",
    "eval/patch_fid_*": "generator: the same of centred 299x299 patches that are not resized",
    "eval/teacher_patch_fid_*": "teacher: the same",
    "eval/kid_*": "generator: kernel inception distance, over N samples; unbiased",
    "eval/teacher_kid_*": "teacher: the same",
    "eval/precision_*": "generator: share of N samples within the reference's manifold (3 nearest neighbours)",
    "eval/teacher_precision_*": "teacher: the same",
    "eval/recall_*": "generator: share of the reference within the manifold of N samples (3 nearest neighbours)",
    "eval/teacher_recall_*": "teacher: the same",
    "eval/clip_score_*": "generator: mean cosine between N samples and their captions by a CLIP model",
    "eval/teacher_clip_score_*": "teacher: the same",
    "eval/queue": "evaluations that were asked for and are not done",
    "eval/behind_updates": "generator updates made since the newest snapshot that has figures",
    "eval/lag_updates": "generator updates made between the snapshot and its result",
    "eval/seconds": "seconds one evaluation took",
    "eval/skipped": "snapshots passed over because a newer one was waiting",
    "eval/failed": "evaluations that the evaluator did not survive",
    # data
    "data/accepted": "training samples read",
    "data/rejected": "training samples refused, all reasons together",
    "data/rejected/*": "training samples refused for one reason",
    # snapshots
    "snapshot/seconds": "seconds to write one snapshot",
    "snapshot/bytes": "size of one snapshot",
    # their copies at checkpoint.uri
    "upload/lag_updates": "generator updates made since the newest snapshot that is copied",
    "upload/waiting": "snapshots that are not copied yet",
    "upload/retries": "attempts to copy that have failed since the process began",
    "upload/seconds": "seconds the last copy took",
    "upload/bytes": "bytes of the last copy",
    # the tracker itself
    "tracking/unsent_bytes": "journal that MLflow does not have yet",
    "tracking/dropped_points": "metric values lost because the journal was full while MLflow did not answer",
}

_ALLOWED = re.compile(r"[\w./:-]+")  # what MLflow takes
_known: set[str] = set()


def check_metric_names(names: Iterable[str]) -> None:
    """Raise ValueError, with the nearest valid name, if a name is not in METRICS (patterns by fnmatch)."""
    for name in names:
        if name in _known:
            continue
        if not _ALLOWED.fullmatch(name) or not any(fnmatch.fnmatchcase(name, pattern) for pattern in METRICS):
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0)
            raise ValueError(
                f"metric {name!r} is not in raydistill.tracking.METRICS; the nearest name is {near[0]!r}. "
                "Names are "
                "added there first, with what they mean"
            )
        _known.add(name)
