"""Names of operations, as torch dispatches them, by what they do.

What is not torch's is not told by its name: a `HostType` names its products, and numbers are asked of the rest.
"""

from collections.abc import Collection

from torch import Tag

__all__ = [
    "BOUNDED", "CONSTANT_STEPS", "LOOKUPS", "MATMULS", "NORMS", "SCALES", "SOFTMAX", "VIEWS", "WHOLE_NORMS",
    "is_attention", "is_named",
]  # fmt: skip


def _ops(names: str) -> frozenset[str]:
    """Return the names in a text."""
    return frozenset(names.split())


# They hand one tensor's values on: as another view, copy or type.
VIEWS = _ops(
    "view _unsafe_view reshape _reshape_alias t transpose permute movedim expand squeeze unsqueeze flatten unflatten "
    "alias detach clone _to_copy to contiguous native_dropout dropout slice select lift_fresh as_strided "
    "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind item"
)
# They may stand between a branch's last projection and its residual addition: they change values (LayerScale, a gate, a
# drop path, windows put back in order), but mix no other tokens or features in.
SCALES = _ops(
    "mul mul_ div div_ neg rsub tanh sigmoid clamp clip nan_to_num sum mean where masked_fill roll pad constant_pad_nd "
    "cat stack index gather scatter index_put_ copy_ im2col col2im squeeze_ index_select unfold"
)
# Of these, or of one of these and a constant, a stream stays the same stream: sqrt(2) * x.
CONSTANT_STEPS = _ops("mul mul_ div div_ add add_ sub sub_")
# Their results are numbers between bounds: a gate, for what it is multiplied with.
BOUNDED = _ops("sigmoid sigmoid_ tanh tanh_")
# Products. One with a weight is a projection; one of two activations is attention's, or a gate between tokens.
MATMULS = _ops(
    "mm addmm bmm baddbmm addbmm mv dot linear matmul einsum mkldnn_linear _grouped_mm "
    "convolution _convolution convolution_overrideable mkldnn_convolution _addmm_activation"
)
LOOKUPS = _ops("embedding embedding_bag _embedding_bag index index_select gather")
SOFTMAX = _ops("_softmax _safe_softmax softmax")
# Norms that are one operation, and then those and what norms written by hand are made of.
WHOLE_NORMS = _ops("native_layer_norm layer_norm _fused_rms_norm rms_norm native_group_norm")
NORMS = WHOLE_NORMS | _ops(
    "rsqrt linalg_vector_norm batch_norm "
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
    "cudnn_batch_norm "
    "sqrt std std_mean var var_mean"  # norms written by hand
)
# They choose, sort, measure, fill in, sample, or are a whole recurrent layer: with a matrix of the model's, no product.
_OTHERS = _ops(
    "max min sort topk kthvalue median mode searchsorted bucketize isin take put masked_select repeat_interleave "
    "index_add index_copy index_fill index_put index_reduce _unsafe_index _unsafe_index_put masked_scatter "
    "scatter_add scatter_reduce slice_scatter select_scatter diagonal_scatter as_strided_scatter segment_reduce "
    "_euclidean_dist _cdist_forward cdist copy fill set_ resize_as grid_sampler_2d grid_sampler_3d "
    "lstm gru rnn_tanh rnn_relu mkldnn_rnn_layer _cudnn_rnn miopen_rnn"
)
_NAMED = VIEWS | SCALES | CONSTANT_STEPS | BOUNDED | MATMULS | LOOKUPS | SOFTMAX | NORMS | _OTHERS


def is_named(op: str, tags: Collection[Tag]) -> bool:
    """Tell whether what one of torch's operations does with a matrix of the model's is known by its name or tags."""
    return Tag.pointwise in tags or not _NAMED.isdisjoint((op, op.rstrip("_"))) or is_attention(op)


def is_attention(op: str) -> bool:
    """Tell whether an operation is a whole attention, whichever kernel runs it."""
    is_kernel = op in ("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward")
    return (is_kernel or "scaled_dot_product" in op) and "::" not in op and not op.endswith("backward")
