//! `kernels/*.cu` -> one cubin per architecture and one PTX for later ones, embedded through `$OUT_DIR/images.rs`.
//!
//! The compiler is NVRTC from the PyPI wheel that `pyproject.toml` lists as a build requirement, found through the
//! Python that runs the build: no CUDA toolkit, no headers, no GPU, and the same compiler, hence the same images, on
//! every machine. A toolkit in PATH or CUDA_HOME is not picked up: images of a 13.x one need a newer driver (580, not
//! 525).
//!
//! Environment:
//!   FLOWDPPO_KERNELS=none                         embed nothing: lint and documentation builds, CPU-only packages
//!   FLOWDPPO_ARCHS=sm_90,compute_90               other architectures; sm_ gives an image, compute_ gives PTX
//!   FLOWDPPO_NVRTC=/path/libnvrtc.so.12           NVRTC from elsewhere
//!   FLOWDPPO_NVCC=/path/nvcc                      nvcc instead of NVRTC

use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, ptr, thread};

use libloading::{Library, Symbol};

/// sm_86 and sm_89 would run the image of sm_80, but were not scheduled for. sm_100 serves 103 and sm_120 serves 121.
/// PTX of the lowest is what a driver compiles for generations that do not exist yet.
const ARCHS: [&str; 7] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80"];

/// Of NVRTC and nvcc. No product is fused with a sum but where the kernels say `fmaf`: their twins on the CPU round
/// both, and of a residual that is given back, `u / std - residual` would be the product's rounding, not 0.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "-Ikernels"];

const REQUIREMENT: &str = "nvidia-cuda-nvrtc-cu12==12.9.86";

/// Through the metadata, because `nvidia` may be a namespace package or a regular one.
const PROBE: &str = "
from importlib.metadata import distribution
print(distribution('nvidia-cuda-nvrtc-cu12').locate_file('nvidia/cuda_nvrtc/lib/libnvrtc.so.12'))
";

type Outcome<T> = Result<T, String>;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Cargo shows the standard error of a build script that fails.
            eprintln!("flowdppo_ops: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Outcome<()> {
    // A directory stands for all files in it. No PATH and no PYO3_PYTHON here: pip's build environment has another path
    // every time and is gone afterwards, while the images in OUT_DIR stay valid.
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["KERNELS", "ARCHS", "NVRTC", "NVCC"] {
        println!("cargo:rerun-if-env-changed=FLOWDPPO_{name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run by Cargo only")?);
    let jobs = jobs()?;
    let mut table = images(&jobs)?;
    if !jobs.is_empty() {
        match Compiler::find() {
            Ok(compiler) => compile_all(&jobs, &compiler, &out)?,
            // A package without its kernels would be found out on a GPU only. Plain `cargo build` and `cargo test`
            // make no package, and work from a fresh clone.
            Err(missing) if !makes_package() => {
                table = images(&[])?;
                for line in missing.lines() {
                    println!("cargo::warning={line}");
                }
                println!("cargo::warning=built without GPU kernels");
                // A file that never exists: looks for the compiler again next time.
                println!("cargo:rerun-if-changed={}", out.join("no-compiler").display());
            }
            Err(missing) => return Err(missing),
        }
    }
    write(&out.join("images.rs"), table.as_bytes())
}

/// maturin, and with it pip and uv, names the Python that it builds for.
fn makes_package() -> bool {
    env::var_os("PYO3_PYTHON").is_some() || env::var_os("PYTHON_SYS_EXECUTABLE").is_some()
}

/// One source for one architecture.
struct Job {
    unit: String,
    source: PathBuf,
    arch: String,
}

impl Job {
    fn is_ptx(&self) -> bool {
        self.arch.starts_with("compute_")
    }

    fn file_name(&self) -> String {
        format!("{}.{}", self.unit, self.arch)
    }
}

fn jobs() -> Outcome<Vec<Job>> {
    match env::var("FLOWDPPO_KERNELS").as_deref() {
        Ok("none") => return Ok(Vec::new()),
        Ok("") | Err(_) => {}
        Ok(other) => return Err(format!("FLOWDPPO_KERNELS is {other:?}, wanted \"none\" or nothing")),
    }
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Ok(Vec::new());
    }
    let archs = match env::var("FLOWDPPO_ARCHS") {
        Ok(list) if !list.is_empty() => list.split(',').map(str::to_owned).collect(),
        _ => ARCHS.map(str::to_owned).to_vec(),
    };
    let mut sources = Vec::new();
    for entry in fs::read_dir("kernels").map_err(|error| format!("kernels/: {error}"))? {
        let path = entry.map_err(|error| format!("kernels/: {error}"))?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    let of = |source: &PathBuf| {
        let unit = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        archs.iter().map(move |arch| (unit.clone(), arch.clone()))
    };
    Ok(sources
        .iter()
        .flat_map(|source| of(source).map(|(unit, arch)| Job { unit, source: source.clone(), arch }))
        .collect())
}

/// The compiler takes 0.2 to 2 s an image, so images are compiled side by side.
fn compile_all(jobs: &[Job], compiler: &Compiler, out: &Path) -> Outcome<()> {
    let threads = env::var("NUM_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(1);
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..jobs.len().min(threads) {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = compiler.compile(job, out) {
                        let text = format!("{} for {}: {error}", job.source.display(), job.arch);
                        errors.lock().expect("no thread panics while it holds the lock").push(text);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("as above");
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

/// The table that `src/cuda/image.rs` includes.
fn images(jobs: &[Job]) -> Outcome<String> {
    let mut table = String::from("pub static IMAGES: &[Image] = &[\n");
    for job in jobs {
        let number = job.arch.split_once('_').and_then(|(_, number)| number.parse::<u32>().ok());
        let capability = number.ok_or_else(|| format!("FLOWDPPO_ARCHS has {:?}, wanted e.g. sm_90", job.arch))?;
        let (unit, ptx, file) = (&job.unit, job.is_ptx(), job.file_name());
        let bytes = format!("embed!(concat!(env!(\"OUT_DIR\"), \"/{file}\"))");
        let _ =
            writeln!(table, "    Image {{ unit: {unit:?}, capability: {capability}, is_ptx: {ptx}, bytes: {bytes} }},");
    }
    table.push_str("];\n");
    Ok(table)
}

fn write(path: &Path, bytes: &[u8]) -> Outcome<()> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

enum Compiler {
    Nvcc(OsString),
    Nvrtc(Nvrtc),
}

impl Compiler {
    fn find() -> Outcome<Compiler> {
        if let Some(nvcc) = env::var_os("FLOWDPPO_NVCC").filter(|path| !path.is_empty()) {
            return Ok(Compiler::Nvcc(nvcc));
        }
        let library = match env::var_os("FLOWDPPO_NVRTC").filter(|path| !path.is_empty()) {
            Some(library) => library.into(),
            None => wheel()?,
        };
        Ok(Compiler::Nvrtc(Nvrtc::open(&library)?))
    }

    fn compile(&self, job: &Job, out: &Path) -> Outcome<()> {
        let target = out.join(job.file_name());
        match self {
            Compiler::Nvcc(nvcc) => run_nvcc(nvcc, job, &target),
            Compiler::Nvrtc(nvrtc) => write(&target, &nvrtc.compile(job)?),
        }
    }
}

/// NVRTC of the wheel, asked of the Python that builds. pip and uv reach their isolated environment through
/// variables that a child process inherits, so the interpreter must be run without -I, -E and -S.
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
         (or set FLOWDPPO_NVCC=/path/nvcc); to build without them: FLOWDPPO_KERNELS=none"
    ))
}

fn run_nvcc(nvcc: &OsString, job: &Job, target: &Path) -> Outcome<()> {
    let kind = if job.is_ptx() { "--ptx" } else { "--cubin" };
    let output = Command::new(nvcc)
        .args(OPTIONS)
        .args([kind, "-arch", &job.arch, "-o"])
        .args([target, &job.source])
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.to_string_lossy()))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    if job.is_ptx() {
        // The driver takes PTX as a C string. NVRTC ends it with a NUL, nvcc does not.
        let mut text = fs::read(target).map_err(|error| format!("{}: {error}", target.display()))?;
        text.push(0);
        write(target, &text)?;
    }
    Ok(())
}

// ---- NVRTC, https://docs.nvidia.com/cuda/archive/12.9.1/nvrtc/index.html -------------------------------------------

type Program = *mut c_void;
type Status = c_int;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Status;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status;
type Destroy = unsafe extern "C" fn(*mut Program) -> Status;
type Size = unsafe extern "C" fn(Program, *mut usize) -> Status;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> Status;
type ErrorString = unsafe extern "C" fn(Status) -> *const c_char;

struct Nvrtc(Library);

impl Nvrtc {
    fn open(path: &Path) -> Outcome<Nvrtc> {
        // SAFETY: loading runs the initialisers of NVIDIA's library, which ask nothing of this process. By absolute
        // path, so that its run path finds libnvrtc-builtins beside it.
        unsafe { Library::new(path) }.map(Nvrtc).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// # Safety
    /// `T` is the type of `name` in nvrtc.h.
    unsafe fn function<T>(&self, name: &str) -> Outcome<Symbol<'_, T>> {
        // SAFETY: the type is right by the contract of this function.
        unsafe { self.0.get(name.as_bytes()) }.map_err(|error| format!("{name}: {error}"))
    }

    fn check(&self, status: Status) -> Outcome<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the type stands in nvrtc.h; the string it returns is static.
        Err(unsafe {
            let text = self.function::<ErrorString>("nvrtcGetErrorString")?(status);
            CStr::from_ptr(text).to_string_lossy().into_owned()
        })
    }

    fn compile(&self, job: &Job) -> Outcome<Vec<u8>> {
        let source = fs::read_to_string(&job.source).map_err(|error| error.to_string())?;
        let name = job.source.to_string_lossy().into_owned();
        let options = OPTIONS.map(str::to_owned).into_iter().chain([format!("--gpu-architecture={}", job.arch)]);
        let strings: Vec<CString> = [source, name]
            .into_iter()
            .chain(options)
            .map(|text| CString::new(text).map_err(|error| error.to_string()))
            .collect::<Outcome<_>>()?;
        let pointers: Vec<*const c_char> = strings.iter().map(|text| text.as_ptr()).collect();
        let [source, name, options @ ..] = pointers.as_slice() else { unreachable!("two and the options") };

        let mut program: Program = ptr::null_mut();
        // SAFETY: types as in nvrtc.h; the strings live in `strings` to the end of this function, and the program is
        // alive from here to its destruction below.
        unsafe {
            let create = self.function::<Create>("nvrtcCreateProgram")?;
            self.check(create(&mut program, *source, *name, 0, ptr::null(), ptr::null()))?;
            let compile = self.function::<Compile>("nvrtcCompileProgram")?;
            let compiled = self.check(compile(program, options.len() as c_int, options.as_ptr()));
            let log = self.output(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
            let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned();
            let image = compiled.map_err(|error| format!("{error}\n{log}")).and_then(|()| {
                for line in log.lines() {
                    println!("cargo:warning={line}");
                }
                match job.is_ptx() {
                    true => self.output(program, "nvrtcGetPTXSize", "nvrtcGetPTX"),
                    false => self.output(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
                }
            });
            self.check(self.function::<Destroy>("nvrtcDestroyProgram")?(&mut program))?;
            image
        }
    }

    /// # Safety
    /// `program` is alive, and the names are of a size function and of the function that fills as many bytes.
    unsafe fn output(&self, program: Program, size: &str, get: &str) -> Outcome<Vec<u8>> {
        // SAFETY: both as in nvrtc.h by the contract of this function; the buffer has the size just asked for.
        unsafe {
            let mut len = 0;
            self.check(self.function::<Size>(size)?(program, &mut len))?;
            let mut bytes = vec![0u8; len];
            self.check(self.function::<Get>(get)?(program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }
}
