"""The second pass of retrieval on golden features: the original's matching logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.eval import retrieval
from iv2_jax.eval.retrieval_rerank import judge
from iv2_jax.eval.retrieval_towers import EncodedMedia, Towers
from iv2_jax.models.stage2 import Stage2
from tests.parity.goldens import OUTPUT_LIMIT, assert_close
from tests.parity.stage2_goldens import channels_last, stage2_config, stage2_params


def test_scores_and_logits(golden):
    case = golden("s2_visual_all_losses")
    config = stage2_config(case)
    params = stage2_params(case, config)
    video = channels_last(case.inputs["video"])

    @jax.jit
    def encode(params):
        def method(model):
            return model.encode_vision(jnp.asarray(video))

        return Stage2(config).apply({"params": params}, method=method)

    vision = jax.device_get(encode(params))
    count = len(video)
    media = EncodedMedia(
        np.arange(count), vision.joint, dict(enumerate(vision.tokens)), np.zeros(count, np.int32)
    )
    towers = Towers(params, config)
    texts = towers.encode_texts(
        case.inputs["input_ids"], case.inputs["attention_mask"], batch_size=3, keep_hidden=True
    )
    scores = retrieval.cosine_scores(media.joint, texts.joint)
    assert_close(scores, case.outputs["eval/sim_v2t"], OUTPUT_LIMIT, "sim_v2t")
    judged = judge(towers, media, texts, "video", scores, scores.T, top=count, pairs_per_batch=2)
    assert_close(judged.logits, case.outputs["eval/itm_match_logit"], OUTPUT_LIMIT, "logits")
