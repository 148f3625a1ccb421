//! Compiles `kernels/*.cu` to a cubin per architecture and to PTX for later ones, which `$OUT_DIR/images.rs` embeds.
//! The compiler is NVRTC from the PyPI wheel that `pyproject.toml` lists as a build requirement, found through the
//! Python that runs the build: it needs no CUDA toolkit, headers or GPU, and makes the same images on every machine. A
//! toolkit in PATH or CUDA_HOME is not used: images of a 13.x one need a newer driver (580, not 525).
//!
//! Environment:
//!   FLOWDPPO_KERNELS=none                         embed nothing: lint and documentation builds, CPU-only packages
//!   FLOWDPPO_ARCHS=sm_90,compute_90               other architectures; sm_ gives an image, compute_ gives PTX
//!   FLOWDPPO_NVRTC=/path/libnvrtc.so.12           NVRTC from elsewhere, a toolkit's for example

use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs, ptr, thread};

use libloading::{Library, Symbol};

/// An sm_80 image runs on sm_86 and sm_89, but is not scheduled for them. sm_100 serves 103, sm_120 serves 121. The
/// PTX, of the lowest, is what drivers compile for generations that do not exist yet.
const ARCHS: &str = "sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_80";

/// No product is fused with a sum except where kernels say `fma`: the CPU rounds both. And for the residual of the
/// same policy, `u / std - residual` is 0, where fusing would leave the rounding error of the product.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "-Ikernels"];

const REQUIREMENT: &str = "nvidia-cuda-nvrtc-cu12==12.9.86";

/// From the metadata, because `nvidia` may be a namespace package or a regular one.
const PROBE: &str = "
from importlib.metadata import distribution
print(distribution('nvidia-cuda-nvrtc-cu12').locate_file('nvidia/cuda_nvrtc/lib/libnvrtc.so.12'))
";

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flowdppo_ops: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Outcome<()> {
    // Not PATH or PYO3_PYTHON: they change with pip's build environment, while the images in OUT_DIR stay valid.
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["KERNELS", "ARCHS", "NVRTC"] {
        println!("cargo:rerun-if-env-changed=FLOWDPPO_{name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run by Cargo only")?);
    let mut jobs = jobs()?;
    if !jobs.is_empty() {
        match Nvrtc::find() {
            Ok(compiler) => compile_all(&jobs, &compiler, &out)?,
            // A package without kernels would fail only on a GPU, so building one is an error. `cargo build` and `cargo
            // test` make no package, and work from a fresh clone.
            Err(missing) if !makes_package() => {
                jobs.clear();
                for line in missing.to_string().lines() {
                    println!("cargo::warning={line}");
                }
                println!("cargo::warning=built without GPU kernels");
                // A file that never exists: Cargo runs this script again next time.
                println!("cargo:rerun-if-changed={}", out.join("no-compiler").display());
            }
            Err(missing) => return Err(missing),
        }
    }
    write(&out.join("images.rs"), table(&jobs).as_bytes())
}

/// maturin, and with it pip and uv, names the Python that it builds for.
fn makes_package() -> bool {
    env::var_os("PYO3_PYTHON").is_some() || env::var_os("PYTHON_SYS_EXECUTABLE").is_some()
}

struct Job {
    unit: String,
    source: PathBuf,
    arch: String,
    capability: u32,
    is_ptx: bool,
}

impl Job {
    fn new(source: &Path, arch: &str) -> Outcome<Job> {
        let number = arch.split_once('_').and_then(|(_, number)| number.parse().ok());
        Ok(Job {
            unit: source.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            source: source.to_owned(),
            arch: arch.to_owned(),
            capability: number.ok_or_else(|| format!("FLOWDPPO_ARCHS has {arch:?}, wanted e.g. sm_90"))?,
            is_ptx: arch.starts_with("compute_"),
        })
    }

    fn file_name(&self) -> String {
        format!("{}.{}", self.unit, self.arch)
    }
}

fn jobs() -> Outcome<Vec<Job>> {
    let mut jobs = Vec::new();
    match env::var("FLOWDPPO_KERNELS").as_deref() {
        Ok("none") => return Ok(jobs),
        Ok("") | Err(_) => {}
        Ok(other) => return Err(format!("FLOWDPPO_KERNELS is {other:?}, wanted \"none\" or nothing").into()),
    }
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Ok(jobs);
    }
    let archs = env::var("FLOWDPPO_ARCHS").ok().filter(|list| !list.is_empty()).unwrap_or(ARCHS.to_owned());
    for entry in fs::read_dir("kernels").map_err(|error| format!("kernels/: {error}"))? {
        let source = entry?.path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            for arch in archs.split(',') {
                jobs.push(Job::new(&source, arch)?);
            }
        }
    }
    // Stable: architectures stay in order.
    jobs.sort_by(|one, other| one.source.cmp(&other.source));
    Ok(jobs)
}

/// The compiler takes 0.2 to 2 s an image, so images are compiled side by side.
fn compile_all(jobs: &[Job], compiler: &Nvrtc, out: &Path) -> Outcome<()> {
    let threads = env::var("NUM_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(1).clamp(1, jobs.len());
    let compile = |job: &Job| match compiler.compile(job).and_then(|image| write(&out.join(job.file_name()), &image)) {
        Ok(()) => None,
        Err(error) => Some(format!("{} for {}: {error}", job.source.display(), job.arch)),
    };
    let errors: Vec<String> = thread::scope(|scope| {
        let share = |first| move || jobs.iter().skip(first).step_by(threads).filter_map(compile).collect::<Vec<_>>();
        let shares: Vec<_> = (0..threads).map(|first| scope.spawn(share(first))).collect();
        shares.into_iter().flat_map(|share| share.join().expect("errors are returned")).collect()
    });
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n").into()) }
}

/// The table that `src/cuda/image.rs` includes.
fn table(jobs: &[Job]) -> String {
    let mut table = String::from("pub static IMAGES: &[Image] = &[\n");
    for job in jobs {
        let Job { unit, capability, is_ptx, .. } = job;
        let bytes = format!("embed!(concat!(env!(\"OUT_DIR\"), \"/{}\"))", job.file_name());
        let image = format!("Image {{ unit: {unit:?}, capability: {capability}, is_ptx: {is_ptx}, bytes: {bytes} }}");
        let _ = writeln!(table, "    {image},");
    }
    table + "];\n"
}

fn write(path: &Path, bytes: &[u8]) -> Outcome<()> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// NVRTC of the wheel, asked of the Python that builds; not with -I, -E or -S, because pip and uv pass their isolated
/// environment in variables.
fn wheel() -> Outcome<PathBuf> {
    let in_venv = env::var_os("VIRTUAL_ENV").map(|venv| Path::new(&venv).join("bin/python").into_os_string());
    let named_by_maturin = [env::var_os("PYO3_PYTHON"), env::var_os("PYTHON_SYS_EXECUTABLE")];
    let candidates = named_by_maturin.into_iter().chain([in_venv, Some("python3".into()), Some("python".into())]);
    let mut tried = String::new();
    for python in candidates.flatten() {
        let why = match Command::new(&python).args(["-c", PROBE]).output() {
            Err(error) => error.to_string(),
            Ok(output) => {
                let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                if !path.is_empty() {
                    return Ok(path.into());
                }
                String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("no answer").to_owned()
            }
        };
        let _ = writeln!(tried, "  {}: {why}", python.to_string_lossy());
    }
    Err(format!(
        "no CUDA compiler found in any of these:\n{tried}To build the GPU kernels: pip install {REQUIREMENT}\n\
         (or set FLOWDPPO_NVRTC=/path/libnvrtc.so.12); to build without them: FLOWDPPO_KERNELS=none"
    )
    .into())
}

// ---- NVRTC, https://docs.nvidia.com/cuda/archive/12.9.1/nvrtc/index.html -------------------------------------------

type Program = *mut c_void;
type Status = c_int;
type Strings = *const *const c_char;

struct Nvrtc(Library);

impl Nvrtc {
    fn find() -> Outcome<Nvrtc> {
        let named = env::var_os("FLOWDPPO_NVRTC").filter(|path| !path.is_empty());
        let path = named.map_or_else(wheel, |path| Ok(path.into()))?;
        // SAFETY: loading runs the initialisers of NVIDIA's library, which ask nothing of this process.
        // By absolute path it finds libnvrtc-builtins beside it.
        unsafe { Library::new(&path) }.map(Nvrtc).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// # Safety
    /// `T` is the type of `name` in nvrtc.h.
    unsafe fn function<T>(&self, name: &str) -> Outcome<Symbol<'_, T>> {
        // SAFETY: the type is right by the contract of this function.
        unsafe { self.0.get(name.as_bytes()) }.map_err(|error| format!("{name}: {error}").into())
    }

    fn check(&self, status: Status) -> Outcome<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the type stands in nvrtc.h; the string it returns is static.
        let text = unsafe {
            let text = self.function::<unsafe extern "C" fn(Status) -> *const c_char>("nvrtcGetErrorString")?;
            CStr::from_ptr(text(status))
        };
        Err(text.to_string_lossy().into())
    }

    fn compile(&self, job: &Job) -> Outcome<Vec<u8>> {
        let source = CString::new(fs::read(&job.source)?)?;
        let name = CString::new(job.source.to_string_lossy().as_bytes())?;
        let arch = format!("--gpu-architecture={}", job.arch);
        let options = OPTIONS.into_iter().chain([&*arch]).map(CString::new).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();

        let mut program: Program = ptr::null_mut();
        // SAFETY: types as in nvrtc.h; the strings outlive the program, which is alive until it is destroyed below.
        unsafe {
            type Create =
                unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, Strings, Strings) -> Status;
            let create = self.function::<Create>("nvrtcCreateProgram")?;
            self.check(create(&mut program, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()))?;
            type Compile = unsafe extern "C" fn(Program, c_int, Strings) -> Status;
            let compile = self.function::<Compile>("nvrtcCompileProgram")?;
            let compiled = self.check(compile(program, options.len() as c_int, options.as_ptr()));
            let log = self.output(program, "ProgramLog")?;
            let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned();
            let image = match compiled {
                Ok(()) => self.output(program, if job.is_ptx { "PTX" } else { "CUBIN" }),
                Err(error) => Err(format!("{error}\n{log}").into()),
            };
            if image.is_ok() {
                log.lines().for_each(|line| println!("cargo:warning={line}"));
            }
            type Destroy = unsafe extern "C" fn(*mut Program) -> Status;
            self.check(self.function::<Destroy>("nvrtcDestroyProgram")?(&mut program))?;
            image
        }
    }

    /// # Safety
    /// `program` is alive; nvrtc.h has `nvrtcGet..` and `nvrtcGet..Size` of what is asked for.
    unsafe fn output(&self, program: Program, what: &str) -> Outcome<Vec<u8>> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> Status;
        type Get = unsafe extern "C" fn(Program, *mut c_char) -> Status;
        let mut len = 0;
        // SAFETY: as in nvrtc.h by the contract of this function; the buffer has the size just asked for.
        unsafe {
            self.check(self.function::<Size>(&format!("nvrtcGet{what}Size"))?(program, &mut len))?;
            let mut bytes = vec![0u8; len];
            self.check(self.function::<Get>(&format!("nvrtcGet{what}"))?(program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }
}
