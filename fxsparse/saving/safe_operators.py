"""The functions that a saved program may call: arithmetic on tensors and shapes, and nothing else.

An allow list, because torch registers well over a thousand operators and its loader takes any attribute of `torch`.
Left out on purpose: operators that touch files, print or warn (`from_file`, `_print`), that change the storage of a
tensor (`set_`, `resize_`, any `out` overload), that trust their arguments (`_reshape_alias`, `native_group_norm`,
sparse tensors, quantized and vendor kernels), that hand out memory which nobody has written (`empty`), and all
operators that run graphs of their own (`cond`, `wrap_with_autocast`).
"""

from __future__ import annotations

import re

SPARSE_CONV = "torch.ops.fxsparse.conv2d.default"

_ATEN_NAMES = """
__and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _assert_async
_assert_scalar _assert_tensor_metadata _shape_as_tensor _to_copy _upsample_bicubic2d_aa
_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
_weight_norm abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr
adjoint affine_grid_generator alias alias_copy all allclose alpha_dropout amax amin aminmax angle any arange
arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere as_strided asin asinh
atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm
bernoulli bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu channel_shuffle
chunk clamp clamp_max clamp_min clip clone col2im column_stack complex concat concatenate conj conj_physical
constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
convolution copy copysign cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum
deg2rad detach diag diag_embed diagonal diff digamma div divide dot dropout dstack einsum elu embedding eq
equal erf erfc erfinv exp exp2 expand expand_as expm1 eye feature_dropout fft_fft fft_fft2 fft_fftn
fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
fft_rfftn fill fix flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac
frobenius_norm full full_like gather ge gelu glu greater greater_equal grid_sampler group_norm gru gt
hardshrink hardsigmoid hardswish hardtanh heaviside hstack huber_loss hypot im2col imag index index_add
index_copy index_fill index_put index_select inner instance_norm inverse isclose isfinite isin isinf isnan
isneginf isposinf item kron kthvalue l1_loss layer_norm ldexp le leaky_relu lerp less less_equal lift_fresh
lift_fresh_copy linalg_cross linalg_inv linalg_matmul linalg_matrix_norm linalg_multi_dot linalg_norm
linalg_vecdot linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp
logaddexp2 logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm lt masked_fill
masked_scatter masked_select matmul max max_pool1d max_pool1d_with_indices max_pool2d
max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d maximum mean median
meshgrid min minimum mish mm moveaxis movedim mse_loss mul multiply mv nan_to_num nanmean nansum narrow ne
neg negative new_full new_ones new_zeros nonzero nonzero_static norm normal not_equal numel numpy_T one_hot
ones ones_like outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle polar positive pow prelu
prod rad2deg rand rand_like randint randint_like randn randn_like randperm ravel real reciprocal
reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder renorm repeat repeat_interleave
replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm
rnn_relu rnn_tanh roll rot90 round row_stack rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention
scatter scatter_add scatter_reduce select select_copy select_scatter selu sgn sigmoid sign signbit silu sin
sinc sinh size slice slice_copy slice_scatter smooth_l1_loss softmax softplus softshrink sort special_expit
special_log_softmax special_softmax split split_with_sizes split_with_sizes_copy sqrt square squeeze stack
std std_mean storage_offset stride sub subtract sum sum_to_size swapaxes swapdims sym_constrain_range
sym_constrain_range_for_size sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride t take
take_along_dim tan tanh tensor_split tensordot threshold tile to topk trace transpose tril tril_indices triu
triu_indices true_divide trunc type_as unbind unflatten unfold uniform unsafe_chunk unsafe_split
unsafe_split_with_sizes unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean vdot view view_as
view_as_complex view_as_real view_copy vsplit vstack where xlogy zero zeros zeros_like
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_SHAPE_NAMES = """
_operator.eq _operator.ne _operator.le _operator.ge _operator.lt _operator.gt _operator.neg _operator.pos
_operator.mul _operator.add _operator.sub _operator.floordiv _operator.mod _operator.pow _operator.truediv
_operator.and_ _operator.or_ math.trunc torch.sym_not torch.sym_int torch.sym_float torch.sym_ite torch.sym_max
torch.sym_min torch.sym_sqrt
"""
_SHAPE_ARITHMETIC = frozenset(_SHAPE_NAMES.split())

_ATEN_TARGET = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]{1,60})\.([A-Za-z0-9_]{1,60})")


def is_safe(target: str) -> bool:
    """Tell whether a saved program may call the function of this name, as torch.export writes it."""
    matched = _ATEN_TARGET.fullmatch(target)
    if matched is None:
        return target == SPARSE_CONV or target in _SHAPE_ARITHMETIC
    name, overload = matched.groups()
    in_place = name.endswith("_") and not name.endswith("__")
    return (name[:-1] if in_place else name) in _ATEN and overload != "out" and not overload.endswith("_out")
