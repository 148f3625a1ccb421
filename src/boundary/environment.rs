//! The environment variables that a call looks at. Python reads and refuses their values; here is only the question
//! whether any is set, which Python's `os.environ` takes a tenth of a small call to answer.

use std::env::var_os;

pub const VARIABLES: [&str; 2] = ["FLOWDPPO_OPS_BACKEND", "FLOWDPPO_OPS_CHECK"];

/// Whether a variable is set, so that Python has to look at the call.
pub fn asks_for_more() -> bool {
    VARIABLES.iter().any(|name| var_os(name).is_some())
}
