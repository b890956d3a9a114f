//! Certificates for drills.

use std::path::PathBuf;
use std::process::Command;

/// Certificates, made for one drill.
#[derive(Debug)]
pub struct Certificates(tempfile::TempDir);

impl Certificates {
    /// Creates an authority, and its certificates for a server at 127.0.0.1 and localhost and for a
    /// client.
    ///
    /// # Errors
    /// If openssl(1) is not installed.
    pub fn new() -> Result<Self, String> {
        let openssl = crate::servers::installed(&["openssl"])?;
        let directory = tempfile::tempdir().expect("a directory");
        // Servers that run as other users read them, too.
        std::fs::set_permissions(
            &directory,
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .expect("a directory");
        let script = "
            exec 2>openssl.log
            authority() {
                $0 req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj \"/O=lockkit $1\" \
                    -addext basicConstraints=critical,CA:TRUE -keyout $1.key -out $1.pem
            }
            signed() {
                $0 req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj \"/O=lockkit $1\" \
                    -keyout $1.key -out $1.csr
                printf \"subjectAltName=DNS:localhost,IP:127.0.0.1\\nextendedKeyUsage=$2\\n\" >$1.ext
                $0 x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile $1.ext -out $1.pem
            }
            authority ca; authority stranger; signed server serverAuth,clientAuth; signed client clientAuth; chmod 644 *";
        let made = Command::new("sh")
            .args(["-ec", script])
            .arg(openssl)
            .current_dir(&directory)
            .status();
        assert!(
            made.is_ok_and(|status| status.success()),
            "openssl failed in {}",
            directory.keep().display()
        );
        Ok(Self(directory))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Returns the authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// Returns the certificate of an authority that has signed nothing here.
    pub fn stranger(&self) -> PathBuf {
        self.file("stranger.pem")
    }

    /// Returns the server's certificate and key.
    pub fn server(&self) -> [PathBuf; 2] {
        ["server.pem", "server.key"].map(|name| self.file(name))
    }

    /// Returns a client's certificate and key.
    pub fn client(&self) -> [PathBuf; 2] {
        ["client.pem", "client.key"].map(|name| self.file(name))
    }
}
