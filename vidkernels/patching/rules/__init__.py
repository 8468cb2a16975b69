# SPDX-License-Identifier: Apache-2.0
"""The package's own rules: one file per upstream library and model.

A line names a `Rule` or a sequence of them as `"module:attribute"`. The module imports torch and vidkernels, never the
model library. Order matters: a rule that serves a whole subtree comes before the rules of its parts.
"""

from __future__ import annotations

RULES: list[str] = [
    "vidkernels.patching.rules.diffusers_vidtok:RULES",
    "vidkernels.patching.rules.diffusers_latte:RULES",
    "vidkernels.patching.rules.diffusers_dit:RULES",
    "vidkernels.patching.rules.diffusers_sd3:RULES",
    "vidkernels.patching.rules.diffusers_flux:RULES",
    "vidkernels.patching.rules.diffusers_allegro:RULES",
    "vidkernels.patching.rules.diffusers_mochi:RULES",
    "vidkernels.patching.rules.diffusers_cosmos:RULES",
    "vidkernels.patching.rules.diffusers_norms:RULES",
    "vidkernels.patching.rules.diffusers_activations:RULES",
    "vidkernels.patching.rules.official_dit:RULES",
    "vidkernels.patching.rules.official_opensora:RULES",
    "vidkernels.patching.rules.official_opensora_plan:RULES",
    "vidkernels.patching.rules.official_attention:RULES",
    "vidkernels.patching.rules.official_wan:RULES",
    "vidkernels.patching.rules.diffusers_wan:RULES",
    "vidkernels.patching.rules.diffusers_wan_relatives:RULES",
    "vidkernels.patching.rules.diffusers_hunyuan_video:RULES",
    "vidkernels.patching.rules.diffusers_cogvideox:RULES",
    "vidkernels.patching.rules.diffusers_ltx:RULES",
    "vidkernels.patching.rules.diffusers_ltx2:RULES",
    "vidkernels.patching.rules.diffusers_kandinsky:RULES",
    "vidkernels.patching.rules.diffusers_easyanimate:RULES",
    "vidkernels.patching.rules.diffusers_sana_video:RULES",
    "vidkernels.patching.rules.diffusers_wan_vae:RULES",
    "vidkernels.patching.rules.diffusers_qwenimage_vae:RULES",
    "vidkernels.patching.rules.diffusers_hunyuan_vae:RULES",
    "vidkernels.patching.rules.diffusers_cogvideox_vae:RULES",
    "vidkernels.patching.rules.diffusers_ltx_vae:RULES",
    "vidkernels.patching.rules.diffusers_ltx2_vae:RULES",
    "vidkernels.patching.rules.diffusers_cosmos_vae:RULES",
    "vidkernels.patching.rules.diffusers_magvit_vae:RULES",
    "vidkernels.patching.rules.diffusers_hunyuan15_vae:RULES",
    "vidkernels.patching.rules.diffusers_mochi_vae:RULES",
    "vidkernels.patching.rules.diffusers_allegro_vae:RULES",
    "vidkernels.patching.rules.diffusers_image_vae:RULES",
    "vidkernels.patching.rules.diffusers_temporal_decoder:RULES",
    "vidkernels.patching.rules.quantizers:RULES",
    "vidkernels.patching.rules.official_quantizers:RULES",
    "vidkernels.patching.rules.official_vidtok:RULES",
    "vidkernels.patching.rules.official_wan_vae:RULES",
    "vidkernels.patching.rules.official_opensora_vae:RULES",
    "vidkernels.patching.rules.official_wf_vae:RULES",
    "vidkernels.patching.rules.official_opensora_plan_vae:RULES",
    "vidkernels.patching.rules.official_magvit2_pytorch:RULES",
    "vidkernels.patching.rules.official_magvit2:RULES",
    "vidkernels.patching.rules.official_magvit2_image:RULES",
    "vidkernels.patching.rules.official_vqgan:RULES",
]
