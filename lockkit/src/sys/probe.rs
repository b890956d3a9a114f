//! The system's answer about a pid.

/// The system's answer about a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// No process has the pid.
    Gone,
    /// The process that has the pid runs no code any more. On Unix it was killed and is being torn
    /// down, or is a zombie. On Windows an open handle on it remains.
    Ended,
    /// A process that has the pid. With its start time, on Windows its creation time, if this
    /// process may see it.
    Running(Option<u64>),
}
