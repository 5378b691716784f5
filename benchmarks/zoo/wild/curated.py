"""Specs that are always judged: every part on its own, and combinations that people have built."""

from __future__ import annotations

from .spec import PARTS, Spec, changed, parse

__all__ = ["curated"]

_BUILT = """
norm=post,qkv=separate,norm_by=layer,attention=torch
norm=post,stream=scaled
norm=post,norm_by=hand,feedforward=glu
norm=post,norm_by=torch,container=pairs
norm=post,unit=residual
norm=post,container=columns
norm=post,layout=second,attention=torch
norm=post,attention=cross,container=dicts
norm=sandwich,norm_by=rms,feedforward=glu,attention=gqa
norm=end,norm_by=rms,attention=gqa,feedforward=glu
norm=none,unit=residual,container=flat
norm=none,stream=layerscale
norm_by=rms,attention=gqa,feedforward=glu,core=hand
norm_by=rms,attention=gqa,feedforward=moe,router=topk
norm_by=rms,attention=gqa,feedforward=moe,router=sigmoid,experts=shared
norm_by=hand,feedforward=glu,attention=value_residual
norm_by=torch,attention=self,qkv=fused,core=einsum
norm_in=part,container=pairs
norm_in=part,container=pairs,unit=residual
norm_in=part,container=flat,unit=residual
norm_in=part,container=stages,feedforward=glu
norm_in=part,container=pairs,attention=sparse
norm_in=part,attention=linear,container=pairs
norm_in=part,attention=conv_mix,unit=residual,container=sequential
norm_in=part,stream=reversible
norm_in=part,stream=nested,qkv=kv
attention=residual_scores,norm=post
attention=residual_scores,container=pairs
attention=value_residual,container=attributes
attention=gated_output,qkv=fused
attention=gated_values,core=einsum
attention=talking,stream=layerscale
attention=window,qkv=fused,stream=layerscale
attention=cross,stream=nested,qkv=kv
attention=cross_one,qkv=kv,unit=bare
attention=cross,layout=second,norm=post
attention=cross,container=pairs,norm_in=part
attention=window,layout=third
attention=token_mlp,container=sequential
attention=linear,feedforward=conv
feedforward=moe,router=top1,norm=post
feedforward=moe,router=top1,experts=tensor
feedforward=moe,router=sigmoid,experts=tensor
feedforward=moe,router=soft,experts=tensor
feedforward=moe,router=expert_choice,norm_in=part,container=pairs
feedforward=moe,router=dense,stream=parallel
feedforward=moe,router=hash,norm=post
feedforward=moe,router=topk,container=stages
feedforward=glu_fused,norm_by=rms,qkv=fused,stream=parallel
feedforward=conv,norm=post,layout=first
feedforward=conv,layout=channels
stream=parallel,norm_by=rms,unit=bare
stream=parallel,container=pairs
stream=macaron,feedforward=glu
stream=macaron,norm_in=part,container=attributes
stream=half,unit=bare
stream=sum_scaled,unit=residual
stream=nested,attention=torch
stream=nested,layout=channels
stream=nested,unit=residual,norm_in=part
stream=long_add,container=pairs
stream=long_cat,feedforward=glu
stream=trend,norm=none
stream=trend,norm=none,attention=window
stream=broadcast,container=dicts
stream=two,norm=post
stream=hyper,norm_by=rms,attention=gqa
container=stages,unit=residual
container=tied,norm=post
container=tied,attention=torch,norm=post
container=columns,norm_in=part
container=attributes,layout=second,attention=torch
container=flat,attention=cross
unit=tuple,norm=post
unit=bare,norm=post
unit=bare,attention=talking,side=dropout
side=quantised,feedforward=glu
side=quantised,norm=post,qkv=fused
side=lora,feedforward=glu
side=lora,container=pairs,norm_in=part
side=dropout,norm=post
layout=third,norm=post
layout=channels,norm=post,attention=window
wrapper=checkpoint,norm=post
wrapper=compile,container=tied
"""


def curated() -> list[Spec]:
    """List the specs, each once."""
    alone = [changed(Spec(), row, part) for row, parts in PARTS.items() for part in parts[1:]]
    return list(dict.fromkeys([Spec(), *alone, *map(parse, _BUILT.split())]))
