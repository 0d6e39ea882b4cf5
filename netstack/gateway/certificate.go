package gateway

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A keyPair is the server's certificate, from two files that are read again when they change.
type keyPair struct {
	cert, key string
	log       *slog.Logger

	mu     sync.Mutex
	states [2]fileState // when it was read
	loaded *tls.Certificate
}

func openKeyPair(cert, key string, log *slog.Logger) (*keyPair, error) {
	k := &keyPair{cert: cert, key: key, log: log}
	if err := k.load(); err != nil {
		return nil, fmt.Errorf("gateway: certificate: %w", err)
	}
	return k, nil
}

func (k *keyPair) load() error {
	var states [2]fileState
	for i, path := range []string{k.cert, k.key} {
		var err error
		if states[i], err = stateOf(path); err != nil {
			return err
		}
	}
	k.states = states
	c, err := tls.LoadX509KeyPair(k.cert, k.key)
	if err != nil {
		return err
	}
	k.loaded = &c
	return nil
}

// get is for [tls.Config.GetCertificate]. A pair that does not fit, as while it is being
// replaced, is tried again later.
func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c, err1 := stateOf(k.cert)
	key, err2 := stateOf(k.key)
	if err := errors.Join(err1, err2); err != nil {
		k.log.Error("the certificate is as before", "error", err)
		return k.loaded, nil
	}
	if c.same(k.states[0]) && key.same(k.states[1]) {
		return k.loaded, nil
	}
	if err := k.load(); err != nil {
		k.log.Error("the certificate is as before", "error", err)
		return k.loaded, nil
	}
	k.log.Info("certificate read again", "file", k.cert, "until", k.loaded.Leaf.NotAfter)
	return k.loaded, nil
}

// pin is by what openconnect --servercert knows the key: SHA-256 of its SubjectPublicKeyInfo.
func pin(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return "pin-sha256:" + base64.StdEncoding.EncodeToString(sum[:])
}

// Names of the self-signed certificate in the state folder.
const (
	selfSignedCert = "server.crt"
	selfSignedKey  = "server.key"
)

// selfSigned finds the self-signed certificate in folder, or makes one for names. Who connects knows it
// by its pin, which stays.
func selfSigned(folder string, names []string) (cert, key string, err error) {
	cert, key = filepath.Join(folder, selfSignedCert), filepath.Join(folder, selfSignedKey)
	_, err1 := os.Stat(cert)
	_, err2 := os.Stat(key)
	if err1 == nil && err2 == nil {
		return cert, key, nil
	}
	for _, err := range []error{err1, err2} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", "", err
		}
	}
	// A key is kept: its pin may be known.
	k, err := selfSignedKeyIn(key)
	if err != nil {
		return "", "", fmt.Errorf("gateway: %s: %w", key, err)
	}
	template, err := selfSignedTemplate(names)
	if err != nil {
		return "", "", err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		return "", "", err
	}
	return cert, key, replaceFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

func selfSignedKeyIn(path string) (*ecdsa.PrivateKey, error) {
	if data, err := os.ReadFile(path); err == nil {
		block, _ := pem.Decode(data)
		if block == nil {
			return nil, errors.New("is no PEM file")
		}
		k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		if k, ok := k.(*ecdsa.PrivateKey); ok {
			return k, nil
		}
		return nil, errors.New("has a key of another kind")
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, err
	}
	return k, replaceFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func selfSignedTemplate(names []string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "penstock"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(10, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		// Nothing else can be signed with it.
		BasicConstraintsValid: true,
	}
	for i, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, n)
		}
		if i == 0 {
			c.Subject.CommonName = n
		}
	}
	return c, nil
}

// readCAs reads the certificates of a PEM file.
func readCAs(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("gateway: client CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("gateway: client CA: %s has no certificate in PEM form", path)
	}
	return pool, nil
}

// CertificateUser says which name in a client's certificate is that of the user.
type CertificateUser string

// The names that a certificate has.
const (
	CertificateCN    CertificateUser = "cn"    // the subject's common name
	CertificateUID   CertificateUser = "uid"   // the subject's UID, 0.9.2342.19200300.100.1.1 (RFC 4519 2.39)
	CertificateEmail CertificateUser = "email" // the first rfc822Name
	CertificateDNS   CertificateUser = "dns"   // the first dNSName
	CertificateURI   CertificateUser = "uri"   // what follows the last slash or colon of the first URI
)

// nameIn finds it; "" when c, which may be nil, has none that can be a user's.
func (u CertificateUser) nameIn(c *x509.Certificate) string {
	if c == nil {
		return ""
	}
	name := ""
	switch u {
	case CertificateUID:
		for _, n := range c.Subject.Names {
			if n.Type.Equal(oidUID) {
				name, _ = n.Value.(string)
			}
		}
	case CertificateEmail:
		name = first(c.EmailAddresses)
	case CertificateDNS:
		name = first(c.DNSNames)
	case CertificateURI:
		if len(c.URIs) > 0 {
			name = c.URIs[0].String()
			for i := len(name) - 1; i >= 0; i-- {
				if name[i] == '/' || name[i] == ':' {
					name = name[i+1:]
					break
				}
			}
		}
	default:
		name = c.Subject.CommonName
	}
	if CheckName(name) != "" {
		return ""
	}
	return name
}

var oidUID = asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}

func first(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return names[0]
}
