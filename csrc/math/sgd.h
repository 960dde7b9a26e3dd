// SGD with momentum and LARS on one element, for host and device; torch.optim.SGD's arithmetic, roundings included.
//
//   g = grad * inv_scale * clip;  if maximize: g = -g;  g += wd * p;  [g *= multiplier]
//   buf = g on the parameter's first step, else mu * buf + (1 - damp) * g
//   d = g + mu * buf if nesterov else buf;  p -= lr * d                     p is the fp32 master of a half parameter
//
//   inv_scale = 1 / grad_scale;  clip = min(1, max_norm / (|all g * inv_scale| + 1e-6))
//   trust = eta * |p| / (|g * inv_scale * clip| + wd * |p| + eps), 1 where a norm is 0   (LARS, You et al. 2017)
//   multiplier = trust, or lr * trust where the momentum sums up lr * g (then p -= d)
#pragma once

#include <math.h>

#include "math/common.h"

namespace fasttricks {

// The factors shared by all elements of one tensor.
struct SgdScalars {
  double inv_scale, clip, weight_decay, multiplier, momentum, one_minus_dampening, lr;
  bool has_scale, has_clip, maximize, has_multiplier, has_momentum, first, nesterov, lr_in_momentum;
};

FT_HD double sgd_clip(double max_norm, double norm) {
  const double clip = max_norm / (norm + 1e-6);
  return clip > 1.0 ? 1.0 : clip;  // NaN stays NaN: its step is skipped
}

FT_HD double lars_trust(double eta, double weight_norm, double grad_norm, double weight_decay, double eps) {
  const bool both = weight_norm > 0.0 && grad_norm > 0.0;
  return both ? eta * weight_norm / (grad_norm + weight_decay * weight_norm + eps) : 1.0;
}

// a * b + c with one rounding; vector types define their own overload.
FT_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
FT_HD double fused(double a, double b, double c) { return fma(a, b, c); }

// V is float, double, or a vector of either.
template <class V>
struct SgdCoefficients {
  V inv_scale, clip, weight_decay, multiplier, momentum, one_minus_dampening, minus_lr, minus_one;

  template <class T>
  static FT_HD SgdCoefficients of(const SgdScalars& s, T) {
    return {V(T(s.inv_scale)),  V(T(s.clip)),     V(T(s.weight_decay)),
            V(T(s.multiplier)), V(T(s.momentum)), V(T(s.one_minus_dampening)),
            V(T(-s.lr)),        V(T(-1))};
  }
};

template <class V>
FT_HD void sgd_update(const SgdScalars& s, const SgdCoefficients<V>& k, V g, V& p, V& buf) {
  if (s.has_scale) g = g * k.inv_scale;
  if (s.has_clip) g = g * k.clip;
  if (s.maximize) g = g * k.minus_one;
  if (s.weight_decay != 0.0) g = fused(p, k.weight_decay, g);
  if (s.has_multiplier) g = g * k.multiplier;
  V d = g;
  if (s.has_momentum) {
    buf = s.first ? g : fused(g, k.one_minus_dampening, buf * k.momentum);
    d = s.nesterov ? fused(buf, k.momentum, g) : buf;
  }
  p = s.lr_in_momentum ? fused(d, k.minus_one, p) : fused(d, k.minus_lr, p);
}

}  // namespace fasttricks
