//! objective
/// Names of the metrics, in the order in which every backend writes them.
pub const METRICS: [&str; 18] = [
    "ratio_mean",
    "ratio_std",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "ppo_kl",
    "kl_new_old_mean",
    "kl_new_old_max",
    "kl_mask_fraction",
    "pos_rm_fraction",
    "neg_rm_fraction",
    "masked_fraction",
    "unmasked_fraction",
    "clip_fraction",
    "clipfrac_gt_one",
    "clipfrac_lt_one",
    "nonfinite_fraction",
    "kl_loss",
];
