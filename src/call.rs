//! A call as the boundary describes it and as the CPU backend and the kernels read it; one file for each operator.
//! `kernels/call.cuh` is the twin of all structs and enums, field for field; both assert sizes and offsets. Fields are
//! named after the public functions' arguments; an address of 0 is an absent argument. `NoUninit` proves that there is
//! no hidden padding. The boundary holds the tensors behind the addresses while the call runs, all on one device, and
//! has checked dtype, length and layout.

use std::mem::offset_of;

use bytemuck::NoUninit;

use crate::error::Error;

// ---- tables: names once, in the order in which they stand in memory -------------------------------------------------

/// C enums, with the names that users write for the variants.
macro_rules! options {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, NoUninit)]
        #[repr(i32)]
        pub enum $name { #[default] $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            pub const NAMES: &[&str] = &[$($text),+];

            pub fn parse(argument: &'static str, came: &str) -> Result<Self, Error> {
                match came {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(Error::Option { name: argument, came: came.to_owned(), wanted: Self::NAMES }),
                }
            }

            pub fn name(self) -> &'static str {
                Self::NAMES[self as usize]
            }
        }
    )+};
}

/// A struct of fields of one type, with their names.
macro_rules! table {
    ($(#[$doc:meta])* $name:ident of $kind:ty { $($(#[$field_doc:meta])* $field:ident,)+ }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, NoUninit)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)+ }

        impl $name {
            pub const NAMES: [&str; [$(stringify!($field)),+].len()] = [$(stringify!($field)),+];

            pub fn each(&self) -> [&$kind; Self::NAMES.len()] {
                [$(&self.$field),+]
            }

            pub fn each_mut(&mut self) -> [&mut $kind; Self::NAMES.len()] {
                [$(&mut self.$field),+]
            }

            pub fn named(&self) -> impl Iterator<Item = (&'static str, &$kind)> {
                Self::NAMES.into_iter().zip(self.each())
            }
        }
    };
}

const fn joined<const N: usize>(tables: &[&[&'static str]]) -> [&'static str; N] {
    let (mut names, mut table, mut at, mut first) = ([""; N], 0, 0, 0);
    while table < tables.len() {
        while at < first + tables[table].len() {
            names[at] = tables[table][at - first];
            at += 1;
        }
        (table, first) = (table + 1, at);
    }
    names
}

/// An enum of the rows of a block of numbers, with their names.
macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            pub const NAMES: [&str; [$(stringify!($variant)),+].len()] = [$(stringify!($variant)),+];
        }
    };
}

options! {
    Dtype { F32 = "float32", Bf16 = "bfloat16", F16 = "float16", F64 = "float64" }
}

impl Dtype {
    pub const ALL: [Dtype; 4] = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64];

    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F64 => 8,
        }
    }
}

/// A bool of a C struct.
pub type Flag = i32;

/// `[rows, numel]`, contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Latent {
    pub data: u64,
    pub dtype: Dtype,
    pub pad: i32,
}

impl Latent {
    pub fn new(data: u64, dtype: Dtype) -> Latent {
        Latent { data, dtype, pad: 0 }
    }

    pub fn is_present(&self) -> bool {
        self.data != 0
    }
}

/// One number for all rows, or an array that broadcasts to them: row r has element `r / divide % modulo`. Rows `[B, S]`
/// read `[1, S]` with (divide, modulo) = (1, S), `[B, 1]` with (S, B), one element with (1, 1).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct RowVector {
    /// 0: `value`, for all rows.
    pub data: u64,
    pub value: f64,
    pub dtype: Dtype,
    pub present: Flag,
    /// At least 1, as is `modulo`, where `data` is not 0.
    pub divide: u32,
    pub modulo: u32,
}

impl RowVector {
    pub fn number(value: f64) -> RowVector {
        RowVector { value, present: 1, ..RowVector::default() }
    }

    /// Refuses a `divide` or `modulo` of 0 (both are divisors) or beyond `rows`.
    pub fn array(
        name: &'static str, data: u64, dtype: Dtype, (divide, modulo): (usize, usize), rows: usize,
    ) -> Result<RowVector, Error> {
        let wrong = Error::Broadcast { name, divide, modulo, rows };
        let fits = (1..=rows).contains(&divide) && (1..=rows).contains(&modulo);
        match (u32::try_from(divide), u32::try_from(modulo)) {
            (Ok(divide), Ok(modulo)) if fits => Ok(RowVector { data, value: 0.0, dtype, present: 1, divide, modulo }),
            _ => Err(wrong),
        }
    }

    pub fn is_present(&self) -> bool {
        self.present != 0
    }
}

table! {
    Schedule of RowVector {
        sigma,
        sigma_next,
        noise_level,
        sigma_max,
        /// Absent without `uncond_output`.
        guidance_scale,
    }
}

options! {
    /// `None`: a call of means, without a schedule.
    Sampler { None = "none", FlowSde = "flow_sde", DanceSde = "dance_sde", Cps = "cps" }
}

// After the macros, which these files use.
mod policy_loss;
mod sde_step;
pub use policy_loss::*;
pub use sde_step::*;

// ---- the twin in kernels/call.cuh asserts the same ------------------------------------------------------------------

const _: () = {
    assert!(size_of::<Latent>() == 16 && size_of::<RowVector>() == 32);
    assert!(offset_of!(RowVector, dtype) == 16 && offset_of!(RowVector, modulo) == 28);
    assert!(size_of::<Latents>() == 160 && size_of::<SdeStepLatents>() == 80);
    assert!(size_of::<RowVectors>() == 224 && size_of::<Schedule>() == 160);
    assert!(size_of::<Objective>() == 56 && offset_of!(Objective, kind) == 32);
    assert!(size_of::<Settings>() == 24 && offset_of!(Settings, reduction) == 20);
    assert!(size_of::<PolicyLoss>() == 640 && offset_of!(PolicyLoss, objective) == 560);
    assert!(size_of::<PolicyLossForward>() == 688 && offset_of!(PolicyLossForward, splits) == 680);
    assert!(size_of::<PolicyLossBackward>() == 248 && offset_of!(PolicyLossBackward, numbers) == 208);
    assert!(size_of::<SdeStep>() == 264 && offset_of!(SdeStep, sampler) == 256);
    assert!(size_of::<SdeStepForward>() == 344 && offset_of!(SdeStepForward, splits) == 336);
    assert!(size_of::<SdeStepBackward>() == 104 && offset_of!(SdeStepBackward, splits) == 96);
};

#[cfg(test)]
#[path = "../tests/unit/call.rs"]
mod tests;
