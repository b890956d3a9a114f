//! User namespaces of tests.

use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use crate::{Actor, Kind, until};

/// A user namespace that maps the uids from 0 to 65,534 and no others; with a copy of the actor that its users can run.
pub struct UserNamespace {
    keeper: Child,
    programs: tempfile::TempDir,
}

impl UserNamespace {
    /// The last uid of the map, which is also that of everybody else in there.
    pub const LAST: u32 = 65_534;

    /// Makes one whose uids begin with `first` outside, or says why that cannot be.
    pub fn new(first: u32) -> Option<Self> {
        let programs = tempfile::tempdir_in("/tmp").expect("it can be made");
        std::fs::set_permissions(programs.path(), PermissionsExt::from_mode(0o755)).expect("it can be made");
        std::fs::copy(crate::program("actor"), programs.path().join("actor")).expect("it can be made");
        let map = format!("{first},0,65535");
        let mut keeper = Command::new("unshare");
        keeper.args(["--user", "--map-users", &map, "--map-groups", &map, "sleep", "300"]);
        let mut keeper = keeper.stderr(Stdio::null()).spawn().ok()?;
        let text = || std::fs::read_to_string(format!("/proc/{}/uid_map", keeper.id())).unwrap_or_default();
        let is_mapped = |text: String| text.split_ascii_whitespace().nth(1) == Some(&first.to_string());
        let mut ended = false;
        until("it is mapped", || {
            ended = std::fs::read_link(format!("/proc/{}/exe", keeper.id())).is_err();
            ended || is_mapped(text())
        });
        if ended {
            let _ = keeper.wait();
            crate::left_out("this machine makes no user namespaces for the test");
            return None;
        }
        Some(Self { keeper, programs })
    }

    /// Starts an actor in there, as the user `uid` of the namespace.
    pub fn start<S: AsRef<std::ffi::OsStr>>(&self, uid: u32, arguments: &[S]) -> Actor {
        Actor::start_with(&Kind::NAMED_SOCKET.fresh(), |command| {
            *command = Command::new("nsenter");
            command.arg(format!("--user=/proc/{}/ns/user", self.keeper.id()));
            command.args([format!("--setuid={uid}"), format!("--setgid={uid}")]);
            command.arg(self.programs.path().join("actor")).args(arguments).current_dir("/");
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        })
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        for base in ["/tmp", "/dev/shm"] {
            let _ = std::fs::remove_dir_all(format!("{base}/lockkit-u{}", Self::LAST));
        }
    }
}
