# SPDX-License-Identifier: Apache-2.0
"""The convolution's C++ kernels under sanitizers: every algorithm, forward and weight gradient, at sizes that leave parts
of vectors and tiles over. And its CUDA kernel on the host."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if os.environ["VIDKERNELS_HOST_KERNELS"] == "cuda":
    from causal_conv3d_boxes import (
        test_boxes,
        test_buffers_of_many_programs,
        test_chunks_of_boxes,
        test_gradients_of_boxes,
    )

    __all__ = ["test_boxes", "test_buffers_of_many_programs", "test_chunks_of_boxes", "test_gradients_of_boxes"]
else:
    from test_causal_conv3d_cpp import (
        test_both_algorithms,
        test_doubled_image,
        test_few_filters,
        test_not_a_number_stays_where_it_is_read,
        test_pairs_and_tiles,
        test_rows_in_place,
    )
    from test_causal_conv3d_wgrad import (
        test_any_number_of_threads_gives_the_same_bits,
        test_error_against_the_more_exact_reference,
        test_every_algorithm,
        test_history,
    )
    from test_causal_conv3d_wgrad import test_doubled_image as test_wgrad_of_a_doubled_image
    from test_causal_conv3d_wgrad import test_pairs as test_pairs_of_wgrad

    __all__ = [
        "test_any_number_of_threads_gives_the_same_bits",
        "test_both_algorithms",
        "test_doubled_image",
        "test_error_against_the_more_exact_reference",
        "test_every_algorithm",
        "test_few_filters",
        "test_history",
        "test_not_a_number_stays_where_it_is_read",
        "test_pairs_and_tiles",
        "test_pairs_of_wgrad",
        "test_rows_in_place",
        "test_wgrad_of_a_doubled_image",
    ]
