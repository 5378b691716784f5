"""Names of operations, as torch dispatches them, by what they do.

What is not torch's is not told by its name: a `HostType` names its products, and numbers are asked of the rest.
"""

__all__ = ["BOUNDED", "CONSTANT_STEPS", "LOOKUPS", "MATMULS", "NORMS", "SCALES", "SOFTMAX", "VIEWS", "WHOLE_NORMS"]


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
    "convolution _convolution convolution_overrideable mkldnn_convolution"
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
