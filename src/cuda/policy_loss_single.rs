//! `policy_loss` on a GPU in a single pass, `kernels/policy_loss_single.cu`: loss and gradient in one cooperative launch.
//!
//! For rows that all multiprocessors together can keep in their shared memory, in dtypes that a typed kernel takes, at
//! addresses that are multiples of 16; `plan` says None for any other, and the two kernels do it.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute};

use super::arguments::long_enough;
use super::device::{Device, During, PerDevice};
use super::launch::{Grid, Kernel, Target, launch};
use super::policy_loss::{ForwardArguments, TYPED, VARIANTS, Workspace, address, forward_arguments, variant};
use crate::cpu::policy_loss::Targets;
use crate::error::Error;
use crate::objective::Problem;
use crate::ops::policy_loss::{Latents, Outputs};
use crate::plan::{GridPlan, SinglePlan};
use crate::tensor::Gpu;

/// `struct PolicyLossSingle`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct SingleArguments {
    forward: ForwardArguments,
    grad_output: usize,
    grad_uncond: usize,
    room: i32,
    pad: i32,
}

const SINGLE_BYTES: usize = 648;
const _: () = assert!(size_of::<SingleArguments>() == SINGLE_BYTES);

const UNIT: &str = "policy_loss_single";

/// Names of all entry points, with the bytes of their only argument.
pub fn entry_points() -> [(String, usize); TYPED] {
    std::array::from_fn(|at| (format!("{UNIT}_{}", VARIANTS[at].suffix), SINGLE_BYTES))
}

/// Blocks of one multiprocessor, by the kernels' launch bounds: one loads while the other waits or writes.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;

struct Kernels {
    device: &'static Device,
    kernels: [Kernel<SingleArguments>; TYPED],
    /// Blocks that run at the same time.
    resident: usize,
    /// Elements that a block keeps.
    room: usize,
}

fn kernels(ordinal: usize) -> Result<&'static Kernels, Error> {
    static KERNELS: PerDevice<Kernels> = PerDevice::new();
    KERNELS.get_or_make(ordinal, || {
        let device = Device::get(ordinal)?;
        let names = entry_points();
        let found = device.load(UNIT, names.each_ref().map(|(name, _)| name.as_str()))?;
        let room = room(device, &found)?;
        let resident = if device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? == 0 {
            0
        } else {
            device.multiprocessors as usize * blocks_per_multiprocessor(device, &found, room)?
        };
        // SAFETY: modules stay loaded; the names pick the kernels by their only argument, whose layout the assertion
        // above and the one in the header pin.
        let kernels = std::array::from_fn(|at| unsafe { Kernel::new(found[at]) });
        Ok(Kernels { device, kernels, resident, room })
    })
}

/// An even share of a multiprocessor's shared memory, less what the system and the kernels' own arrays take of it.
fn room(device: &Device, functions: &[sys::CUfunction]) -> Result<usize, Error> {
    let per_multiprocessor = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
    let reserved = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?;
    let most = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let _bound = device.bind()?;
    let mut own = 0;
    for &function in functions {
        // SAFETY: the function was just found in a loaded module.
        let bytes = unsafe {
            result::function::get_function_attribute(function, FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        };
        own = own.max(bytes.during("cuFuncGetAttribute")?.max(0).cast_unsigned() as usize);
    }
    let share = (per_multiprocessor / BLOCKS_PER_MULTIPROCESSOR).saturating_sub(reserved).min(most).saturating_sub(own);
    Ok(share / size_of::<f32>() / SinglePlan::ROOM_UNIT * SinglePlan::ROOM_UNIT)
}

fn dynamic_bytes(room: usize) -> u32 {
    (room * size_of::<f32>()) as u32 // of one multiprocessor
}

/// Of the kernel that fits least often. Allows each of them its dynamic shared memory.
fn blocks_per_multiprocessor(device: &Device, functions: &[sys::CUfunction], room: usize) -> Result<usize, Error> {
    let _bound = device.bind()?;
    let mut fewest = BLOCKS_PER_MULTIPROCESSOR;
    for &function in functions {
        let bytes = dynamic_bytes(room);
        let dynamic = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as in `room`.
        let blocks = unsafe {
            result::function::set_function_attribute(function, dynamic, bytes.cast_signed())
                .during("cuFuncSetAttribute")?;
            result::occupancy::max_active_block_per_multiprocessor(
                function,
                GridPlan::THREADS.cast_signed(),
                bytes as usize,
            )
        };
        let blocks = blocks.during("cuOccupancyMaxActiveBlocksPerMultiprocessor")?;
        fewest = fewest.min(blocks.max(0).cast_unsigned() as usize);
    }
    Ok(fewest)
}

/// How a call is cut; None where the single pass does not take it.
pub fn plan(
    ordinal: usize,
    latents: &Latents<'_, Gpu>,
    is_step: bool,
    rows: usize,
    numel: usize,
) -> Result<Option<SinglePlan>, Error> {
    let aligned = latents.views().into_iter().flatten().all(|view| view.address().is_multiple_of(16));
    if !aligned || variant(latents, is_step) >= TYPED {
        return Ok(None);
    }
    let Kernels { resident, room, .. } = kernels(ordinal)?;
    Ok(SinglePlan::new(rows, numel, *resident, *room))
}

/// Launches the forward that forms the gradients as well; `problem` and `latents` are checked.
pub fn forward(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    gradients: &Targets<'_, Gpu>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    let is_step = problem.step.is_some();
    let plan = plan(target.device, latents, is_step, problem.rows, problem.numel)?;
    // The gradients are stored as whole vectors, too.
    let aligned =
        [address(&gradients.output), address(&gradients.uncond_output)].iter().all(|at| at.is_multiple_of(16));
    let plan = plan.filter(|_| aligned).ok_or(Error::Missing { name: "a single pass for these latents" })?;
    let Kernels { device, kernels, room, .. } = self::kernels(target.device)?;
    let (partials, tickets) = plan.workspace(problem.rows);
    long_enough("partials", &workspace.partials, partials)?;
    long_enough("tickets", &workspace.tickets, tickets)?;
    let arguments = SingleArguments {
        forward: forward_arguments(problem, latents, Some(outputs), workspace, plan.splits),
        grad_output: address(&gradients.output),
        grad_uncond: address(&gradients.uncond_output),
        room: *room as i32,
        pad: 0,
    };
    let grid = Grid { blocks: plan.blocks(), threads: GridPlan::THREADS, resident: Some(dynamic_bytes(*room)) };
    // SAFETY: addresses and lengths are those of views, whose contract the caller of `new` upheld; grid, splits and room
    // are of one plan, which has looked at dtypes and, as above, at alignment; the stream is `Target`'s.
    unsafe { launch(&kernels[variant(latents, is_step)], device, target.stream, grid, &arguments) }
}
