//! Mutual TLS 1.3: each end proves that it is a host of the same authority, and the one expected.
//!
//! A host is known by the URN in its certificate, `urn:sempervirt:host:NAME`. Addresses that stand
//! there as well are where a host is, and a host may be called as another's address is.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};
use webpki::EndEntityCert;

use crate::args::EndArgs;
use crate::failure::Failure;

const HOST: &str = "urn:sempervirt:host:";
// What a client has to name; no certificate is asked for it.
const NOBODY: &str = "semper-wired.invalid";

/// Certificates of this end, and whom it trusts.
pub(crate) struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    peer: String,
}

fn tls(error: impl std::fmt::Display) -> Failure {
    Failure::Tls(error.to_string())
}

fn read(path: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    std::fs::read(path)
        .map_err(|error| Failure::Tls(format!("no {what} in {}: {error}", path.display())))
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| {
        Failure::Tls(format!("a certificate in {} is damaged: {error}", path.display()))
    })
}

impl Identity {
    pub(crate) fn load(args: &EndArgs) -> Result<Self, Failure> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&read(&args.ca, "certificate")?, &args.ca)? {
            roots.add(certificate).map_err(tls)?;
        }
        // A pair in one file is renewed by a rename: both are of one reading.
        let chain_pem = read(&args.cert, "certificate")?;
        let own_key =
            if args.key == args.cert { None } else { Some(read(&args.key, "private key")?) };
        let key_pem = own_key.as_ref().unwrap_or(&chain_pem);
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| {
            Failure::Tls(format!("no private key in {}: {error}", args.key.display()))
        })?;
        let peer = format!("{HOST}{}", args.peer_name);
        Ok(Self { roots: Arc::new(roots), chain: certificates(&chain_pem, &args.cert)?, key, peer })
    }

    /// The source's side.
    pub(crate) fn client(&self) -> Result<Connection, Failure> {
        let provider = Arc::new(ring::default_provider());
        let expected = ExpectedHost {
            roots: Arc::clone(&self.roots),
            provider: Arc::clone(&provider),
            urn: self.peer.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(expected))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(tls)?;
        config.enable_sni = false;
        let nobody = ServerName::try_from(NOBODY).map_err(tls)?;
        let connection = ClientConnection::new(Arc::new(config), nobody).map_err(tls)?;
        Ok(connection.into())
    }

    /// The destination's side.
    pub(crate) fn server(&self) -> Result<Arc<ServerConfig>, Failure> {
        let provider = Arc::new(ring::default_provider());
        let roots = Arc::clone(&self.roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier.build().map_err(tls)?)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(tls)?;
        // One connection, never resumed.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// A connection of the destination that is being set up.
    pub(crate) fn accept(config: &Arc<ServerConfig>) -> Result<Connection, Failure> {
        ServerConnection::new(Arc::clone(config)).map(Into::into).map_err(tls)
    }

    /// Whether the source's certificate is of the expected host. (rustls checks that it is of the
    /// authority; `ExpectedHost` checks both of a server.)
    pub(crate) fn check_client(&self, connection: &Connection) -> Result<(), Failure> {
        let chain = connection.peer_certificates().unwrap_or_default();
        let certificate = chain.first().ok_or_else(|| tls("the source showed no certificate"))?;
        if !is_host(certificate, &self.peer) {
            return Err(tls(format!("the certificate of the source is not of {}", self.peer)));
        }
        Ok(())
    }
}

/// Whether a certificate, of which the signature is checked elsewhere, is of the host `urn`, and of
/// no other.
fn is_host(certificate: &CertificateDer<'_>, urn: &str) -> bool {
    EndEntityCert::try_from(certificate).is_ok_and(|certificate| {
        let mut hosts = certificate.valid_uri_names().filter(|name| name.starts_with(HOST));
        hosts.next() == Some(urn) && hosts.next().is_none()
    })
}

/// Accepts one host as the server, by its URN.
#[derive(Debug)]
struct ExpectedHost {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    urn: String,
}

impl ServerCertVerifier for ExpectedHost {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        if !is_host(end_entity, &self.urn) {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 alone is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
