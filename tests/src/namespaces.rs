//! User namespaces for tests.

use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use crate::{Actor, Kind, until};

/// A user namespace that maps the uids from 0 to 65,534 and no others, with a copy of the actor
/// that its users can run.
pub struct UserNamespace {
    keeper: Child,
    programs: tempfile::TempDir,
}

impl UserNamespace {
    /// The last uid of the map, which is also that of every unmapped user.
    pub const LAST: u32 = 65_534;

    /// Creates a namespace whose uids begin with `first` outside, or reports why that is
    /// impossible.
    pub fn new(first: u32) -> Option<Self> {
        let programs = tempfile::tempdir_in("/tmp").expect("it can be made");
        std::fs::set_permissions(programs.path(), PermissionsExt::from_mode(0o755))
            .expect("it can be made");
        std::fs::copy(crate::program("actor"), programs.path().join("actor"))
            .expect("it can be made");
        let mut keeper = Command::new("unshare");
        keeper
            .args(["--user", "sleep", "300"])
            .stderr(Stdio::null());
        let mut keeper = keeper.spawn().ok()?;
        let own = std::fs::read_link("/proc/self/ns/user").ok();
        let mut ended = false;
        until("it is in a namespace of its own", || {
            let namespace = std::fs::read_link(format!("/proc/{}/ns/user", keeper.id()));
            ended = keeper.try_wait().is_ok_and(|status| status.is_some());
            ended || (namespace.is_ok() && namespace.ok() != own)
        });
        let map = |file| {
            std::fs::write(
                format!("/proc/{}/{file}", keeper.id()),
                format!("0 {first} 65535\n"),
            )
        };
        let ended = ended || map("uid_map").and(map("gid_map")).is_err();
        if ended {
            let _ = keeper.kill();
            let _ = keeper.wait();
            crate::left_out("this machine makes no user namespaces for the test");
            return None;
        }
        Some(Self { keeper, programs })
    }

    /// Starts an actor in the namespace, as its user `uid`.
    pub fn start<S: AsRef<std::ffi::OsStr>>(&self, uid: u32, arguments: &[S]) -> Actor {
        Actor::start_with(&Kind::NAMED_SOCKET.fresh(), |command| {
            *command = Command::new("nsenter");
            command.arg(format!("--user=/proc/{}/ns/user", self.keeper.id()));
            command.args([format!("--setuid={uid}"), format!("--setgid={uid}")]);
            command
                .arg(self.programs.path().join("actor"))
                .args(arguments)
                .current_dir("/");
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
